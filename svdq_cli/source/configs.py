"""A model's config from its names and shapes, for single files that come without one.

What the shapes of a published architecture do not say (head counts of a UNet, rotary axes) is taken from the published
model of the same shapes; a model whose shapes fit none needs a base pipeline, which has the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from svdq_cli.source.names import block_numbers
from svdq_cli.source.tensors import TensorEntry

Shapes = Mapping[str, TensorEntry]
Facts = dict[str, object]


@dataclass(frozen=True, slots=True)
class KnownClass:
    """One diffusers model class: the keys that give it away, and what its shapes say about its config.

    `facts` reads config values off the shapes. `rest` adds the values that shapes don't show, for models with those
    facts; it returns None where they are not those of a published model. Of a base pipeline's config, the `compared`
    facts must be the same (they tell variants apart); the `counted` ones need not: a pruned model has fewer blocks.
    """

    model_class: str
    component: str
    signature: frozenset[str]
    facts: Callable[[Shapes], Facts]
    rest: Callable[[Facts], Facts | None]
    counted: frozenset[str] = frozenset()
    compared: frozenset[str] = frozenset({"in_channels"})
    legacy_name: str | None = None  # what older configs call the class


def class_of_names(names: Mapping[str, object]) -> KnownClass | None:
    """The class whose diffusers names these are."""
    return next((known for known in KNOWN_CLASSES if known.signature <= names.keys()), None)


def known_class(model_class: str) -> KnownClass:
    return next(known for known in KNOWN_CLASSES if known.model_class == model_class)


def published_config(known: KnownClass, tensors: Shapes) -> Facts | None:
    """The whole config, or None where the shapes are not those of a published model."""
    facts = known.facts(tensors)
    rest = known.rest(facts)
    return None if rest is None else {"_class_name": known.model_class, **rest, **facts}


def _blocks(tensors: Shapes, stack: str) -> int:
    return len(block_numbers(tuple(tensors), f"{stack}.{{}}"))


def _size(tensors: Shapes, name: str, dim: int) -> int:
    """A size of a tensor; 0 where there is no such tensor, which fits no model."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[dim] if -len(shape) <= dim < len(shape) else 0


def _heads(tensors: Shapes, block: str) -> Facts:
    """Head width from the width of the query norm, head count from the width of the model."""
    width = _size(tensors, f"{block}.attn.norm_q.weight", 0)
    hidden = _size(tensors, f"{block}.attn.to_q.weight", 0)
    return {"attention_head_dim": width, "num_attention_heads": hidden // width if width else 0}


# ------------------------------------------------------------------------------------------------- FLUX


def _flux1_facts(tensors: Shapes) -> Facts:
    inputs, outputs = _size(tensors, "x_embedder.weight", 1), _size(tensors, "proj_out.weight", 0)
    return {
        "in_channels": inputs,
        "out_channels": None if outputs == inputs else outputs,
        "num_layers": _blocks(tensors, "transformer_blocks"),
        "num_single_layers": _blocks(tensors, "single_transformer_blocks"),
        **_heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": _size(tensors, "context_embedder.weight", 1),
        "pooled_projection_dim": _size(tensors, "time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _flux1_rest(facts: Facts) -> Facts | None:
    published = facts["attention_head_dim"] == 128
    return {"patch_size": 1, "axes_dims_rope": [16, 56, 56]} if published else None


def _flux2_facts(tensors: Shapes) -> Facts:
    inputs, outputs = _size(tensors, "x_embedder.weight", 1), _size(tensors, "proj_out.weight", 0)
    hidden = _size(tensors, "x_embedder.weight", 0)
    mlp = _size(tensors, "transformer_blocks.0.ff.linear_out.weight", 1)
    return {
        "in_channels": inputs,
        "out_channels": None if outputs == inputs else outputs,
        "num_layers": _blocks(tensors, "transformer_blocks"),
        "num_single_layers": _blocks(tensors, "single_transformer_blocks"),
        **_heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": _size(tensors, "context_embedder.weight", 1),
        "timestep_guidance_channels": _size(
            tensors, "time_guidance_embed.timestep_embedder.linear_1.weight", 1
        ),
        "mlp_ratio": mlp / hidden if hidden else 0.0,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _flux2_rest(facts: Facts) -> Facts | None:
    published = facts["attention_head_dim"] == 128
    rest: Facts = {"patch_size": 1, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6}
    return rest if published else None


# ------------------------------------------------------------------------------------------------- other transformers


def _qwen_facts(tensors: Shapes) -> Facts:
    return {
        "in_channels": _size(tensors, "img_in.weight", 1),
        "out_channels": _size(tensors, "proj_out.weight", 0) // 4,  # pixels of a 2x2 patch
        "num_layers": _blocks(tensors, "transformer_blocks"),
        **_heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": _size(tensors, "txt_in.weight", 1),
    }


def _qwen_rest(facts: Facts) -> Facts | None:
    published = facts["attention_head_dim"] == 128
    return {"patch_size": 2, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56]} if published else None


def _sd3_facts(tensors: Shapes) -> Facts:
    positions = _size(tensors, "pos_embed.pos_embed", 1)
    dual = block_numbers([n for n in tensors if ".attn2." in n], "transformer_blocks.{}")
    hidden = _size(tensors, "context_embedder.weight", 0)
    return {
        "in_channels": _size(tensors, "pos_embed.proj.weight", 1),
        "out_channels": _size(tensors, "proj_out.weight", 0) // 4,  # pixels of a 2x2 patch
        "num_layers": _blocks(tensors, "transformer_blocks"),
        "attention_head_dim": 64,
        "num_attention_heads": hidden // 64,
        "joint_attention_dim": _size(tensors, "context_embedder.weight", 1),
        "caption_projection_dim": hidden,
        "pooled_projection_dim": _size(tensors, "time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": round(positions**0.5),
        "dual_attention_layers": list(dual),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in tensors else None,
    }


def _sd3_rest(facts: Facts) -> Facts | None:
    published = facts["joint_attention_dim"] == 4096 and facts["pooled_projection_dim"] == 2048
    return {"patch_size": 2, "sample_size": 128} if published else None


def _sana_facts(tensors: Shapes) -> Facts:
    hidden = _size(tensors, "patch_embed.proj.weight", 0)
    mlp = _size(tensors, "transformer_blocks.0.ff.conv_point.weight", 1)
    return {
        "in_channels": _size(tensors, "patch_embed.proj.weight", 1),
        "out_channels": _size(tensors, "proj_out.weight", 0),
        "num_layers": _blocks(tensors, "transformer_blocks"),
        "attention_head_dim": 32,
        "num_attention_heads": hidden // 32,
        "cross_attention_dim": _size(tensors, "transformer_blocks.0.attn2.to_q.weight", 0),
        "caption_channels": _size(tensors, "caption_projection.linear_1.weight", 1),
        "mlp_ratio": mlp / hidden if hidden else 0.0,
        "guidance_embeds": any(name.startswith("time_embed.guidance_embedder") for name in tensors),
        "qk_norm": "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in tensors else None,
    }


_SANA_CROSS_HEADS = {1152: (16, 72), 2240: (20, 112)}  # SANA 0.6B and 1.6B: heads, width of one


def _sana_rest(facts: Facts) -> Facts | None:
    heads = _SANA_CROSS_HEADS.get(int(str(facts["cross_attention_dim"])))
    if heads is None or facts["guidance_embeds"]:
        return None
    return {
        "num_cross_attention_heads": heads[0],
        "cross_attention_head_dim": heads[1],
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
    }


def _z_image_facts(tensors: Shapes) -> Facts:
    return {
        "in_channels": _size(tensors, "all_x_embedder.2-1.weight", 1) // 4,  # pixels of a 2x2 patch
        "dim": _size(tensors, "all_x_embedder.2-1.weight", 0),
        "n_layers": _blocks(tensors, "layers"),
        "n_refiner_layers": _blocks(tensors, "context_refiner"),
        "cap_feat_dim": _size(tensors, "cap_embedder.0.weight", 0),
    }


def _z_image_rest(facts: Facts) -> Facts | None:
    if facts["dim"] != 3840:
        return None
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }


def _pixart_facts(tensors: Shapes) -> Facts:
    return {
        "in_channels": _size(tensors, "pos_embed.proj.weight", 1),
        "out_channels": _size(tensors, "proj_out.weight", 0) // 4,  # pixels of a 2x2 patch
        "num_layers": _blocks(tensors, "transformer_blocks"),
        "cross_attention_dim": _size(tensors, "transformer_blocks.0.attn2.to_k.weight", 1),
        "caption_channels": _size(tensors, "caption_projection.linear_1.weight", 1),
    }


def _pixart_rest(facts: Facts) -> Facts | None:
    """Width and head count are those of PixArt-Sigma XL. How large its pictures are (`interpolation_scale`), which the
    512 and 1024 models differ in, no tensor shows."""
    return None


# ------------------------------------------------------------------------------------------------- UNets


def _unet_facts(tensors: Shapes) -> Facts:
    widths: list[int] = []
    while width := _size(tensors, f"down_blocks.{len(widths)}.resnets.0.conv1.weight", 0):
        widths.append(width)
    context = next(
        (entry.shape[1] for name, entry in tensors.items() if name.endswith("attn2.to_k.weight")), 0
    )
    return {
        "in_channels": _size(tensors, "conv_in.weight", 1),
        "out_channels": _size(tensors, "conv_out.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": _blocks(tensors, "down_blocks.0.resnets"),
        "cross_attention_dim": context,
    }


_ATTENTION_DOWN, _PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_ATTENTION_UP, _PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
_SD1: Facts = {
    "sample_size": 64,
    "down_block_types": [*[_ATTENTION_DOWN] * 3, _PLAIN_DOWN],
    "up_block_types": [_PLAIN_UP, *[_ATTENTION_UP] * 3],
    "attention_head_dim": 8,
}
_SD2: Facts = {**_SD1, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_SDXL: Facts = {
    "sample_size": 128,
    "down_block_types": [_PLAIN_DOWN, *[_ATTENTION_DOWN] * 2],
    "up_block_types": [*[_ATTENTION_UP] * 2, _PLAIN_UP],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Widths of the stages and of the text: Stable Diffusion 1.x, 2.x and XL
_UNETS: tuple[tuple[list[int], int, Facts], ...] = (
    ([320, 640, 1280, 1280], 768, _SD1),
    ([320, 640, 1280, 1280], 1024, _SD2),
    ([320, 640, 1280], 2048, _SDXL),
)


def _unet_rest(facts: Facts) -> Facts | None:
    for widths, text, rest in _UNETS:
        if (facts["block_out_channels"], facts["cross_attention_dim"]) == (widths, text):
            return rest
    return None


KNOWN_CLASSES: tuple[KnownClass, ...] = (
    KnownClass(
        "FluxTransformer2DModel",
        "transformer",
        frozenset(
            {
                "transformer_blocks.0.norm1_context.linear.weight",
                "single_transformer_blocks.0.proj_mlp.weight",
            }
        ),
        _flux1_facts,
        _flux1_rest,
        frozenset({"num_layers", "num_single_layers"}),
        frozenset({"in_channels", "guidance_embeds", "joint_attention_dim", "pooled_projection_dim"}),
    ),
    KnownClass(
        "Flux2Transformer2DModel",
        "transformer",
        frozenset(
            {"double_stream_modulation_img.linear.weight", "single_transformer_blocks.0.attn.to_out.weight"}
        ),
        _flux2_facts,
        _flux2_rest,
        frozenset({"num_layers", "num_single_layers"}),
    ),
    KnownClass(
        "QwenImageTransformer2DModel",
        "transformer",
        frozenset({"transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"}),
        _qwen_facts,
        _qwen_rest,
        frozenset({"num_layers"}),
    ),
    KnownClass(
        "SD3Transformer2DModel",
        "transformer",
        frozenset({"transformer_blocks.0.norm1_context.linear.weight", "pos_embed.pos_embed"}),
        _sd3_facts,
        _sd3_rest,
        frozenset({"num_layers"}),
    ),
    KnownClass(
        "SanaTransformer2DModel",
        "transformer",
        frozenset({"transformer_blocks.0.ff.conv_inverted.weight", "caption_norm.weight"}),
        _sana_facts,
        _sana_rest,
        frozenset({"num_layers"}),
    ),
    KnownClass(
        "ZImageTransformer2DModel",
        "transformer",
        frozenset({"all_x_embedder.2-1.weight", "layers.0.adaLN_modulation.0.weight"}),
        _z_image_facts,
        _z_image_rest,
        frozenset({"n_layers"}),
        compared=frozenset(),  # in_channels times the patch's pixels is what a tensor shows
    ),
    KnownClass(
        "PixArtTransformer2DModel",
        "transformer",
        frozenset(
            {"adaln_single.linear.weight", "transformer_blocks.0.scale_shift_table", "pos_embed.proj.weight"}
        ),
        _pixart_facts,
        _pixart_rest,
        frozenset({"num_layers"}),
        legacy_name="Transformer2DModel",
    ),
    KnownClass(
        "UNet2DConditionModel",
        "unet",
        frozenset({"conv_in.weight", "mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight"}),
        _unet_facts,
        _unet_rest,
        compared=frozenset({"in_channels", "cross_attention_dim"}),
    ),
)
