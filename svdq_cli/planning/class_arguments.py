"""What arguments single model classes want where the rules for all (`made_arguments.MAKERS`) do not know.

Each entry makes one argument of `forward`, from what the call's arguments agree upon (`World`). Shapes are those that
diffusers documents for the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from svdq_cli.planning.made_arguments import TEXT, Maker, World, floats, longs, positions


def _tensor(*shape: int | str) -> Maker:
    """A tensor of floats. Sizes: numbers, config keys, or what the world knows: "tokens", "frames", "side", "width" (of
    the argument)."""
    return lambda w, n: floats(*(_size(w, n, size) for size in shape))


def _size(world: World, name: str, size: int | str) -> int:
    match size:
        case int():
            return size
        case "tokens":
            return world.tokens
        case "frames":
            return world.extent.frames
        case "side":
            return world.extent.side
        case "text":
            return world.text
        case "width":
            return world.width(name)
        case key:
            return int(world.config[key])


def _mask(*shape: int | str) -> Maker:
    return lambda w, n: torch.ones([_size(w, n, size) for size in shape], dtype=torch.bool)


def _several(count: int | str, make: Maker) -> Maker:
    """A list of alike values; `count`: a config key counts its value, or the items of it."""

    def made(world: World, name: str) -> list[Any]:
        value = count if isinstance(count, int) else world.config[count]
        return [make(world, name) for _ in range(value if isinstance(value, int) else len(value))]

    return made


def _value(value: Any) -> Maker:
    return lambda w, n: value


def _joint(text: int, axes: int = 3) -> Maker:
    """Positions of text tokens, then of the image's."""
    return lambda w, n: torch.cat(
        [torch.arange(text)[:, None].expand(text, axes), positions(*w.grid, axes=axes)]
    )


def _between(start: int, count: int) -> Maker:
    return _value(torch.arange(start, start + count))


def _lumina_rope(world: World, name: str) -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    head = world.config["hidden_size"] // world.config["num_attention_heads"]
    return get_2d_rotary_pos_embed_lumina(head, 384, 384)


def _residues(world: World, name: str) -> dict[str, torch.Tensor]:
    """Atoms, molecules and bonds of a protein without structure. A time and a recycle index are all that condition it,
    as they are where no CATH label is given."""
    atoms = torch.zeros(1, TEXT, 37, dtype=torch.float32)
    chemistry = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    return {
        **{f"condition_{what}_1_atom": atoms for what in chemistry},
        "condition_index-group_1_token": longs(1, TEXT),
        "molecule_iid": longs(1, TEXT),
        "molecule_entity_id": longs(1, TEXT),
        "token_bond_path_length": longs(1, TEXT, TEXT),
        "is_in_context_conditioning": torch.zeros(1, TEXT, dtype=torch.bool),
        "supports_local_latent": torch.ones(1, TEXT, dtype=torch.bool),
    }


def _text_of_ltx2(direct: str) -> Maker:
    """LTX-2.0 projects its captions; later ones read them as wide as the config key `direct` says."""
    return lambda w, n: floats(
        1, w.text, w.config["caption_channels" if w.config["use_prompt_embeddings"] else direct]
    )


def _wan_animate_cache(world: World, name: str) -> Any:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(world.config["num_layers"])


_TIME = _value(torch.tensor([0.5], dtype=torch.float32))

OF_CLASS: Mapping[str, Mapping[str, Maker]] = {
    "AceStepTransformer1DModel": {
        "hidden_states": _tensor(1, "tokens", "audio_acoustic_hidden_dim"),
        "context_latents": lambda w, n: floats(
            1, w.tokens, w.config["in_channels"] - w.config["audio_acoustic_hidden_dim"]
        ),
    },
    "AnyFlowTransformer3DModel": {
        "timestep": lambda w, n: torch.full((1, w.extent.frames), 0.5, dtype=torch.float32),
        "r_timestep": lambda w, n: torch.full((1, w.extent.frames), 0.25, dtype=torch.float32),
    },
    "AnyFlowFARTransformer3DModel": {
        "timestep": lambda w, n: torch.full((1, w.extent.frames), 0.5, dtype=torch.float32),
        "r_timestep": lambda w, n: torch.full((1, w.extent.frames), 0.25, dtype=torch.float32),
        "chunk_partition": lambda w, n: [1, w.extent.frames - 1],
    },
    "BriaFibo2Transformer2DModel": {
        "encoder_hidden_states": lambda w, n: floats(
            1, 1 + len(w.config["injection_layer_ids"]), TEXT, w.width(n, "cap_feat_dim")
        ),
    },
    "BriaFiboTransformer2DModel": {
        "text_encoder_layers": lambda w, n: [
            floats(1, TEXT, w.width(n, "text_encoder_dim"))
            for _ in range(w.config["num_layers"] + w.config["num_single_layers"])
        ],
    },
    "CosmosTransformer3DModel": {
        # with the channel of the padding mask, which CONFIG_CHANGES keeps the model from making
        "hidden_states": lambda w, n: floats(
            1, w.config["in_channels"] + 1, w.extent.frames, w.extent.side, w.extent.side
        ),
        "fps": _value(16),
    },
    "Cosmos3OmniTransformer": {
        "input_ids": _value(longs(TEXT)),
        "text_indexes": _between(0, TEXT),
        "position_ids": lambda w, n: positions(TEXT + w.tokens, axes=3).T,
        "und_len": _value(TEXT),
        "sequence_length": lambda w, n: TEXT + w.tokens,
        "vision_tokens": lambda w, n: [
            floats(
                1,
                w.config["latent_channel"],
                w.grid[0],
                *(size * w.config["latent_patch_size"] for size in w.grid[1:]),
            )
        ],
        "vision_token_shapes": lambda w, n: [w.grid],
        "vision_sequence_indexes": lambda w, n: torch.arange(TEXT, TEXT + w.tokens),
        "vision_mse_loss_indexes": lambda w, n: torch.arange(TEXT, TEXT + w.tokens),
        "vision_timesteps": lambda w, n: torch.full((w.tokens,), 0.5, dtype=torch.float32),
        "vision_noisy_frame_indexes": lambda w, n: [torch.arange(w.grid[0])],
    },
    "DiTTransformer2DModel": {"class_labels": _value(longs(1))},
    # with the reference image, whose stream has layers of its own
    "Flux3Transformer2DModel": {
        "image_cond_hidden_states": lambda w, n: w.latents("hidden_states"),
        "image_cond_ids": lambda w, n: positions(*w.grid, axes=len(w.config["axes_dims_rope"])).float(),
        "target_timestep": lambda w, n: (
            torch.tensor([0.25], dtype=torch.float32) if w.config["flow_map"] else None
        ),
    },
    "GlmImageTransformer2DModel": {
        "prior_token_id": lambda w, n: longs(1, w.tokens),
        "prior_token_drop": lambda w, n: torch.zeros(1, w.tokens, dtype=torch.bool),
    },
    "HiDreamImageTransformer2DModel": {
        "encoder_hidden_states_llama3": lambda w, n: floats(
            max(w.config["llama_layers"]) + 1, 1, TEXT, w.width(n)
        ),
        "encoder_hidden_states_t5": _tensor(1, "text", "width"),
        "pooled_embeds": _tensor(1, "width"),
    },
    "HunyuanDiT2DModel": {
        "encoder_hidden_states": _tensor(1, "text_len", "cross_attention_dim"),
        "text_embedding_mask": _mask(1, "text_len"),
        "encoder_hidden_states_t5": _tensor(1, "text_len_t5", "cross_attention_dim_t5"),
        "text_embedding_mask_t5": _mask(1, "text_len_t5"),
        "image_meta_size": _value(torch.full((1, 6), 16.0, dtype=torch.float32)),
        "style": _value(longs(1)),
        "image_rotary_emb": lambda w, n: (floats(w.tokens, w.config["attention_head_dim"]),) * 2,
    },
    "HunyuanVideo15Transformer3DModel": {
        "encoder_hidden_states_2": _tensor(1, "text", "text_embed_2_dim"),
        "encoder_attention_mask_2": _mask(1, "text"),
        "image_embeds": _tensor(1, 8, "image_embed_dim"),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "image_embeds": lambda w, n: (
            floats(1, 8, w.config["image_proj_dim"]) if w.config.get("has_image_proj") else None
        ),
        "indices_latents": lambda w, n: torch.arange(w.extent.frames),
        "latents_clean": lambda w, n: floats(1, w.config["in_channels"], 2, w.extent.side, w.extent.side),
        "indices_latents_clean": _value(torch.arange(2)),
        "latents_history_2x": lambda w, n: floats(
            1, w.config["in_channels"], 2, w.extent.side, w.extent.side
        ),
        "indices_latents_history_2x": _value(torch.arange(2)),
        "latents_history_4x": lambda w, n: floats(
            1, w.config["in_channels"], 16, w.extent.side, w.extent.side
        ),
        "indices_latents_history_4x": _value(torch.arange(16)),
    },
    "I2VGenXLUNet": {
        "sample": _tensor(1, 4, "frames", "side", "side"),
        "image_latents": _tensor(1, 4, "frames", "side", "side"),
        "image_embeddings": _tensor(1, "cross_attention_dim"),
    },
    "Ideogram4Transformer2DModel": {
        "encoder_hidden_states": lambda w, n: floats(1, w.tokens, w.width(n, "llm_features_dim")),
        "position_ids": lambda w, n: positions(*w.grid)[None],
        "segment_ids": lambda w, n: longs(1, w.tokens),
        "indicator": lambda w, n: torch.where(torch.arange(w.tokens) < TEXT, 3, 2)[None],
    },
    "JoyImageEditPlusTransformer3DModel": {
        "hidden_states": lambda w, n: floats(1, w.tokens, w.config["in_channels"], *w.config["patch_size"]),
        "shape_list": lambda w, n: [[w.grid]],
    },
    "Kandinsky3UNet": {"encoder_attention_mask": _mask(1, "text")},
    "Kandinsky5Transformer3DModel": {
        "hidden_states": lambda w, n: floats(
            1,
            w.extent.frames,
            w.extent.side,
            w.extent.side,
            w.config["in_visual_dim"] * 2 + 1 if w.config["visual_cond"] else w.config["in_visual_dim"],
        ),
        "visual_rope_pos": lambda w, n: tuple(torch.arange(size) for size in w.grid),
        "text_rope_pos": _value(torch.arange(TEXT)),
    },
    "Kandinsky6Transformer3DModel": {"audio_hidden_states": _tensor(1, 8, "in_audio_dim")},
    "Krea2Transformer2DModel": {
        "encoder_hidden_states": lambda w, n: floats(
            1, TEXT, w.config["num_text_layers"], w.width(n, "text_hidden_dim")
        ),
        "position_ids": _joint(TEXT),
    },
    "LTX2VideoTransformer3DModel": {
        "audio_hidden_states": _tensor(1, 8, "audio_in_channels"),
        "encoder_hidden_states": _text_of_ltx2("cross_attention_dim"),
        "audio_encoder_hidden_states": _text_of_ltx2("audio_cross_attention_dim"),
        "audio_num_frames": _value(8),
        "fps": _value(24.0),
        "sigma": _TIME,
    },
    "LatteTransformer3DModel": {
        "hidden_states": lambda w, n: floats(
            1, w.config["in_channels"], w.config["video_length"], w.extent.side, w.extent.side
        ),
    },
    "LuminaNextDiT2DModel": {
        "cross_attention_kwargs": _value({}),
        "encoder_mask": _mask(1, "text"),
        "image_rotary_emb": _lumina_rope,
    },
    "MiniMaxH3Transformer3DModel": {
        "audio_hidden_states": _tensor(1, 8, "audio_in_channels"),
        "timestep_indices": lambda w, n: longs(TEXT + w.tokens + 8),
        "token_tags": lambda w, n: torch.tensor([1] * TEXT + [0] * w.tokens + [2] * 8, dtype=torch.int64),
        "position_ids": lambda w, n: positions(TEXT + w.tokens + 8),
        "text_indices": _between(0, TEXT),
        "video_indices": lambda w, n: torch.arange(TEXT, TEXT + w.tokens),
        "audio_indices": lambda w, n: torch.arange(TEXT + w.tokens, TEXT + w.tokens + 8),
    },
    "MiniMaxMusic3RVQDepthDecoder": {"inputs_embeds": _tensor(1, 4, "hidden_size")},
    "MiniMaxMusic3Transformer1DModel": {"encoder_hidden_states": _tensor(1, "tokens", "condition_dim")},
    "OmniGenTransformer2DModel": {
        "input_ids": _value(longs(1, TEXT)),
        "input_img_latents": _value([]),
        "input_image_sizes": _value({}),
        "attention_mask": lambda w, n: torch.ones(
            1, TEXT + 1 + w.tokens, TEXT + 1 + w.tokens, dtype=torch.float32
        ),
        "position_ids": lambda w, n: torch.arange(TEXT + 1 + w.tokens)[None],
    },
    "PixArtTransformer2DModel": {
        "added_cond_kwargs": _value(
            {
                "resolution": torch.zeros(1, 2, dtype=torch.float32),
                "aspect_ratio": torch.ones(1, 1, dtype=torch.float32),
            }
        ),
    },
    "PriorTransformer": {
        "hidden_states": _tensor(1, "embedding_dim"),
        "proj_embedding": _tensor(1, "embedding_dim"),
        "encoder_hidden_states": _tensor(1, "num_embeddings", "embedding_dim"),
    },
    "QwenImage21Transformer2DModel": {
        # three text tokens, then the slots of the image, each of which represents 2x2 latent tokens
        "img_mask": lambda w, n: torch.tensor([[False] * TEXT + [True] * (w.tokens // 4)], dtype=torch.bool),
    },
    "RFD4ProteinaTransformer": {
        "bb_ca": _tensor(1, TEXT, 3),
        "local_latents": _tensor(1, TEXT, "latent_dim"),
        "bb_ca_time": _TIME,
        "local_latents_time": _TIME,
        "padding_mask": _mask(1, TEXT),
        "token_type": _value(longs(1, TEXT)),
        "atom37_mask": _mask(1, TEXT, 37),
        "conditioning": _residues,
    },
    "SanaWMTransformer3DModel": {
        "timestep": lambda w, n: torch.full((1, 1, w.grid[0]), 0.5, dtype=torch.float32),
        "encoder_hidden_states": lambda w, n: floats(1, 1, w.text, w.width(n, "caption_channels")),
        "mask": _mask(1, "text"),
    },
    "SanaWMLTX2RefinerTransformer3DModel": {
        "video_rotary_emb": lambda w, n: tuple(
            floats(1, w.tokens, w.config["num_attention_heads"] * w.config["attention_head_dim"])
            for _ in range(2)
        ),
    },
    "StableAudio3DiTModel": {"local_add_cond": _tensor(1, "local_add_cond_dim", "tokens")},
    "StableCascadeUNet": {
        "clip_text_pooled": lambda w, n: floats(1, 1, w.width(n, "clip_text_pooled_in_channels")),
    },
    "T5FilmDecoder": {
        "encodings_and_masks": lambda w, n: [
            (floats(1, TEXT, w.config["d_model"]), torch.ones(1, TEXT, dtype=torch.float32))
        ],
        "decoder_input_tokens": _tensor(1, "targets_length", "input_dims"),
        "decoder_noise_time": _TIME,
    },
    # of VQ-Diffusion, which reads codes; others have channels
    "Transformer2DModel": {
        "hidden_states": lambda w, n: (
            longs(1, w.config["sample_size"] ** 2)
            if w.config["num_vector_embeds"]
            else floats(1, w.config["in_channels"], w.extent.side, w.extent.side)
        ),
        "timestep": _value(
            torch.tensor(0)
        ),  # of all images: its norms split what they make of it along the first axis
    },
    "TransformerTemporalModel": {
        "hidden_states": lambda w, n: floats(
            w.extent.frames, w.config["in_channels"], w.extent.side, w.extent.side
        ),
        "num_frames": lambda w, n: w.extent.frames,
        "encoder_hidden_states": _value(None),
    },
    "UNet1DModel": {"sample": _tensor(1, "in_channels", 1024)},
    "UNetMotionModel": {"encoder_hidden_states": _tensor("frames", "text", "cross_attention_dim")},
    "UNetSpatioTemporalConditionModel": {
        "encoder_hidden_states": _tensor(1, 1, "width"),
        "added_time_ids": _value(torch.zeros(1, 3, dtype=torch.float32)),
    },
    "UVit2DModel": {
        "input_ids": lambda w, n: longs(1, w.extent.side, w.extent.side),
        "pooled_text_emb": lambda w, n: floats(1, w.config["cond_embed_dim"]),
        "micro_conds": _value(torch.zeros(1, 5, dtype=torch.float32)),
    },
    # its first pass, over the reference image: the second one reads what this leaves behind
    "WanAnimate2Transformer3DModel": {
        "hidden_states": lambda w, n: [
            floats(w.config["out_dim"], w.extent.frames, w.extent.side, w.extent.side)
        ],
        "condition_latents": lambda w, n: [
            floats(w.config["in_dim"] - w.config["out_dim"], w.extent.frames, w.extent.side, w.extent.side)
        ],
        "encoder_hidden_states": lambda w, n: [floats(TEXT, w.width(n, "text_dim"))],
        "encoder_hidden_states_image": _tensor(1, 8, 1280),
        "kv_cache": _wan_animate_cache,
        "kv_cache_mode": _value("extract"),
        "seq_len": lambda w, n: w.tokens,
        "offset_grid_sizes": lambda w, n: torch.tensor([w.grid], dtype=torch.int64),
    },
    "WanAnimateTransformer3DModel": {
        "encoder_hidden_states_image": _tensor(1, 8, "image_dim"),
        "pose_hidden_states": lambda w, n: floats(
            1, w.config["latent_channels"], w.extent.frames - 1, w.extent.side, w.extent.side
        ),
        "face_pixel_values": lambda w, n: floats(
            1, 3, 4 * (w.extent.frames - 1), w.config["motion_encoder_size"], w.config["motion_encoder_size"]
        ),
    },
    "WanVACETransformer3DModel": {
        "control_hidden_states": _tensor(1, "vace_in_channels", "frames", "side", "side"),
    },
}

# Arguments that no pipeline gives but those for a special task: a sound to inpaint. Layers that read nothing else run
# in no other calibration.
SPARE_ARGUMENTS = frozenset({"local_add_cond"})

# Config values that a pass is made with instead of the model's own, where they do not change what its blocks compute.
CONFIG_CHANGES: Mapping[str, Mapping[str, Any]] = {
    # the model resizes the mask with torchvision, which need not be installed
    "CosmosTransformer3DModel": {"concat_padding_mask": False},
}
