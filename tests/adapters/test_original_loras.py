"""LoRAs under original names change every layer as diffusers changes it: its own loading and fusing of the same file,
and its conversion of a whole checkpoint that the LoRA was merged into before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import loaders
from diffusers.loaders import single_file_model
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.source import Source, open_source, read_tensor
from svdq_cli.source.names import original_layers
from svdq_cli.source.original_names import NAMINGS, NAMINGS_WITH_BASE, naming_of
from tests.source.originals import original_state

WIDTH, RANK = 64, 2
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
SHORT = {"num_layers": 2, **HEADS}

# Tiny models of every class that diffusers reads LoRAs or checkpoints under original names for
TINY: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        **{**SHORT, "num_single_layers": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32},
        **{"axes_dims_rope": (8, 12, 12), "guidance_embeds": True},
    },
    "Flux2Transformer2DModel": {
        **{**SHORT, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (8, 8, 8, 8)},
        "timestep_guidance_channels": 32,
    },
    "ChromaTransformer2DModel": {
        **{**SHORT, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (8, 12, 12)},
        **{"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 1},
    },
    "Flux3Transformer2DModel": {
        **{**SHORT, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (8, 8, 8, 8)},
        "flow_map": True,
    },
    "Krea2Transformer2DModel": {
        **{**SHORT, "in_channels": 16, "num_key_value_heads": 1, "intermediate_size": 96},
        **{
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "axes_dims_rope": (8, 12, 12),
        },
        **{"text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 48},
        **{"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    },
    "MiniMaxH3Transformer3DModel": {
        **{**SHORT, "hidden_size": WIDTH, "num_refiner_layers": 1, "ffn_dim": 96, "in_channels": 8},
        **{"audio_in_channels": 4, "text_dim": 32, "freq_dim": 32, "time_embed_hidden_dim": 48},
        **{"time_embed_dim": 32, "rope_freq_dim": 4},
    },
    "LTXVideoTransformer3DModel": {**SHORT, "cross_attention_dim": WIDTH, "caption_channels": 32},
    "LTX2VideoTransformer3DModel": {
        **{**SHORT, "cross_attention_dim": WIDTH, "caption_channels": 32, "audio_num_attention_heads": 2},
        **{
            "audio_attention_head_dim": 16,
            "audio_cross_attention_dim": 32,
            "in_channels": 8,
            "out_channels": 8,
        },
        **{"audio_in_channels": 8, "audio_out_channels": 8},
    },
    "HunyuanVideoTransformer3DModel": {
        **{**SHORT, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32},
        **{"pooled_projection_dim": 32, "rope_axes_dim": (8, 12, 12), "guidance_embeds": True},
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        **{**SHORT, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32},
        **{"pooled_projection_dim": 32, "rope_axes_dim": (8, 12, 12), "has_clean_x_embedder": True},
        **{"has_image_proj": True, "image_proj_dim": 32},
    },
    "HunyuanVideo15Transformer3DModel": {
        **{**SHORT, "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 32},
        **{"image_embed_dim": 32, "rope_axes_dim": (8, 12, 12)},
    },
    "HunyuanImageTransformer2DModel": {
        **{**SHORT, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32},
        **{"text_embed_2_dim": 32, "rope_axes_dim": (16, 16), "guidance_embeds": True},
    },
    "Lumina2Transformer2DModel": {
        **{"num_layers": 1, "num_refiner_layers": 1, "hidden_size": 96, "num_attention_heads": 3},
        **{"num_kv_heads": 1, "axes_dim_rope": (16, 8, 8), "cap_feat_dim": 32},
    },
    "CosmosTransformer3DModel": {
        **{**SHORT, "text_embed_dim": 32, "adaln_lora_dim": 16, "extra_pos_embed_type": None}
    },
    "AuraFlowTransformer2DModel": {
        **{**HEADS, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 32},
        **{"caption_projection_dim": WIDTH, "pos_embed_max_size": 16},
    },
    "MochiTransformer3DModel": {
        **{**SHORT, "pooled_projection_dim": 32, "text_embed_dim": 32, "max_sequence_length": 16}
    },
    "QwenImage21Transformer2DModel": {
        **{**SHORT, "in_channels": 8, "out_channels": 8, "axes_dims_rope": (8, 12, 12)},
    },
    "Ideogram4Transformer2DModel": {
        **{**SHORT, "in_channels": 16, "intermediate_size": 96, "adaln_dim": 32, "llm_features_dim": 32},
        "mrope_section": (8, 4, 4),
    },
    "AceStepTransformer1DModel": {
        **{"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32},
        **{"num_key_value_heads": 2, "sliding_window": 16, "num_hidden_layers": 2, "in_channels": 12},
        **{"audio_acoustic_hidden_dim": 4, "patch_size": 2},
    },
    "WanTransformer3DModel": {
        **{**SHORT, "ffn_dim": 96, "text_dim": 32, "image_dim": 32, "added_kv_proj_dim": WIDTH}
    },
    "WanVACETransformer3DModel": {**SHORT, "ffn_dim": 96, "text_dim": 32, "vace_layers": [0]},
    "SkyReelsV2Transformer3DModel": {**SHORT, "ffn_dim": 96, "text_dim": 32},
    "ChronoEditTransformer3DModel": {**SHORT, "ffn_dim": 96, "text_dim": 32},
    "HeliosTransformer3DModel": {**SHORT, "ffn_dim": 96, "text_dim": 32, "rope_dim": (8, 12, 12)},
    "WanAnimateTransformer3DModel": {
        **{**SHORT, "ffn_dim": 96, "text_dim": 32, "image_dim": 32, "added_kv_proj_dim": WIDTH},
        **{"latent_channels": 4, "in_channels": 12, "out_channels": 4, "motion_encoder_size": 8},
        **{"motion_encoder_channel_sizes": {"4": 8, "8": 8}, "motion_style_dim": 16, "motion_dim": 4},
        **{"motion_encoder_dim": 16, "face_encoder_hidden_dim": 32, "face_encoder_num_heads": 2},
        "inject_face_latents_blocks": 1,
    },
    "WanAnimate2Transformer3DModel": {
        **{"dim": WIDTH, "ffn_dim": 96, "freq_dim": 32, "text_dim": 32, "num_heads": 2, "num_layers": 2},
        **{"in_dim": 12, "out_dim": 4},
    },
    "ZImageTransformer2DModel": {
        **{"dim": WIDTH, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"cap_feat_dim": 32, "axes_dims": [8, 12, 12]},
    },
    "SD3Transformer2DModel": {
        **{**SHORT, "joint_attention_dim": 32, "caption_projection_dim": WIDTH, "pooled_projection_dim": 32},
        **{"qk_norm": "rms_norm", "dual_attention_layers": (0,), "pos_embed_max_size": 16},
    },
    "SanaTransformer2DModel": {
        **{**SHORT, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "in_channels": 4},
        **{"out_channels": 4, "cross_attention_dim": WIDTH, "caption_channels": 32},
    },
    "PixArtTransformer2DModel": {
        **{**SHORT, "cross_attention_dim": WIDTH, "caption_channels": 32, "sample_size": 8}
    },
    "UNet2DConditionModel": {
        **{"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8},
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}
# Layers that have no other name in original checkpoints
SAME_NAMES = {
    "Ideogram4Transformer2DModel": (
        *("input_proj", "llm_cond_proj", "t_embedding.", "adaln_proj", "final_layer."),
        "embed_image_indicator",
    ),
    # what Helios has next to Wan's
    "HeliosTransformer3DModel": ("patch_",),
    # convolutions with kernels of their own, which no trainer adapts
    "WanAnimateTransformer3DModel": ("motion_encoder.conv", "motion_encoder.res_blocks"),
    "AceStepTransformer1DModel": ("proj_in_conv", "proj_out_conv", "time_embed", "condition_embedder"),
}


class World:
    """A tiny model on disk, and LoRAs for all its layers under their original names."""

    def __init__(self, class_name: str, folder: Path):
        torch.manual_seed(0)
        self.model = getattr(diffusers, class_name)(**TINY[class_name]).eval()
        self.class_name, self.folder = class_name, folder
        self.model.save_pretrained(folder / "model")
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        found = naming_of(class_name)
        assert found is not None
        self.naming = found
        layers = [name.removesuffix(".weight") for name in self.state if name.endswith(".weight")]
        self.layers = original_layers(self.naming, layers)

    @property
    def source(self) -> Source:
        return open_source(self.folder / "model")

    def is_linear(self, layer: str) -> bool:
        return all(self.state[f"{part.target}.weight"].ndim > 1 for part in self.layers[layer])

    def factors(self, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """A down (R, K) and an up (N, R) matrix for each linear layer, by its original name."""
        generator = torch.Generator().manual_seed(seed)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        done: set[str] = set()
        for layer, parts in self.layers.items():
            targets = {part.target for part in parts}
            if not self.is_linear(layer) or targets & done:  # a layer of several names is named by the first
                continue
            done |= targets
            shapes = [self.state[f"{part.target}.weight"].shape for part in parts]
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1:].numel()
            found[layer] = (
                torch.randn(RANK, columns, generator=generator) / 8,
                torch.randn(rows, RANK, generator=generator) / 8,
            )
        return found

    def merged(self, file: Path) -> dict[str, Tensor]:
        """What svdq adds to each weight, without those it leaves as they are."""
        source = merge_loras(self.source, [LoraFile(file, 1.0)])
        added = {name: read_tensor(source, name).float() - before for name, before in self.state.items()}
        return {name: tensor for name, tensor in added.items() if tensor.any()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def of(class_name: str) -> World:
        if class_name not in made:
            made[class_name] = World(class_name, tmp_path_factory.mktemp(class_name))
        return made[class_name]

    return of


def saved(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata or None)
    return file


def peft_lora(factors: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{layer}.lora_{name}.weight": tensor
        for layer, pair in factors.items()
        for name, tensor in zip("AB", pair, strict=True)
    }


def kohya_lora(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """With an alpha of half the rank, and so with twice the up matrices."""
    found: dict[str, Tensor] = {}
    for layer, (down, up) in factors.items():
        flat = f"lora_unet_{layer.replace('.', '_')}"
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": 2 * up}
        found[f"{flat}.alpha"] = torch.tensor(RANK / 2)
    return found


def assert_close(mine: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every changed tensor, and each to the rounding of float32 sums."""
    assert sorted(mine) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.allclose(mine[name], tensor, rtol=1e-4, atol=1e-6), name


def test_every_naming_has_a_tiny_model_here():
    assert {naming.model_class for naming in (*NAMINGS, *NAMINGS_WITH_BASE)} <= TINY.keys()


@pytest.mark.parametrize("class_name", TINY)
def test_every_linear_layer_of_every_class_has_an_original_name(
    world: Callable[[str], World], class_name: str
):
    """The table of matched layers: all of all."""
    here = world(class_name)
    linears = {
        name.removesuffix(".weight")
        for name, tensor in here.state.items()
        if name.endswith(".weight") and tensor.ndim > 1
    }
    named = {part.target for layer, parts in here.layers.items() if here.is_linear(layer) for part in parts}
    assert {
        name for name in linears - named if not name.startswith(SAME_NAMES.get(class_name, "\0"))
    } == set()


@pytest.mark.parametrize("class_name", TINY)
def test_dotted_and_kohya_names_change_what_the_original_layers_are_split_into(
    world: Callable[[str], World], class_name: str
):
    """Against the rows that the original layer's are moved to: by diffusers' conversion of files where it has one for
    any width, else by svdq's own rules, which test_original_names.py holds against diffusers at full size."""
    here = world(class_name)
    factors = here.factors()
    expected = converted(here, {layer: up @ down for layer, (down, up) in factors.items()})
    dotted = saved(here.folder / "dotted.safetensors", peft_lora(factors, "diffusion_model."))
    assert_close(here.merged(dotted), expected)
    flat = saved(here.folder / "flat.safetensors", kohya_lora(factors))
    assert_close(here.merged(flat), expected)


# Their converters know the widths or the number of blocks of published models alone
OF_ONE_SIZE = ("FluxTransformer", "Chroma", "HunyuanVideo", "Lumina2", "Mochi")


def converted(here: World, added: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is added to each weight of the model, from what is added to its original's."""
    originals = original_state(here.naming, here.state)
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in originals.items()}
    changes = {f"{layer}.weight": change.reshape(shapes[layer]) for layer, change in added.items()}
    if here.class_name.startswith(OF_ONE_SIZE) or not (convert := file_converter(here.class_name)):
        found: dict[str, Tensor] = {}
        for layer, change in added.items():
            for part in here.layers[layer]:
                rows = [change[slice(*each.among(len(change)))] for each in part.rows]
                found[f"{part.target}.weight"] = torch.cat(rows)
        return {name: tensor.reshape(here.state[name].shape) for name, tensor in found.items()}
    prefix = "model.diffusion_model." if here.class_name == "UNet2DConditionModel" else ""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in originals.items()}
    zeros |= {name: torch.zeros(1) for name in here.naming.unused}
    whole = {prefix + name: tensor for name, tensor in (zeros | changes).items()}
    result = convert(checkpoint=whole, config=dict(here.model.config))
    return {name: tensor for name, tensor in result.items() if tensor is not None and tensor.any()}


def file_converter(class_name: str) -> Callable[..., Mapping[str, Tensor]] | None:
    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(class_name, {})
    return known.get("checkpoint_mapping_fn")


# What diffusers' loader for the class leaves under its name or refuses: there the test above is the judge
BLOCKS = (
    "blocks.",
    "layers.",
    "double_blocks.",
    "single_blocks.",
    "content_mode_blocks.",
    "txt_mode_blocks.",
)
LOADERS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "Krea2Transformer2DModel": ("Krea2LoraLoaderMixin", lambda _: True),
    "Flux3Transformer2DModel": ("Flux3LoraLoaderMixin", lambda name: name.startswith(BLOCKS)),
    "MiniMaxH3Transformer3DModel": ("MiniMaxH3LoraLoaderMixin", lambda _: True),
    "LTX2VideoTransformer3DModel": ("LTX2LoraLoaderMixin", lambda _: True),
    # linear1 has 3072 * 7 rows in diffusers
    "HunyuanVideoTransformer3DModel": (
        "HunyuanVideoLoraLoaderMixin",
        lambda name: name.startswith(BLOCKS) and not name.endswith("linear1"),
    ),
    "CosmosTransformer3DModel": ("AnimaLoraLoaderMixin", lambda name: not name.startswith("t_embedder")),
    "Ideogram4Transformer2DModel": ("Ideogram4LoraLoaderMixin", lambda name: name.startswith("layers.")),
    "Flux2Transformer2DModel": ("Flux2LoraLoaderMixin", lambda name: name.startswith(BLOCKS)),
    "WanTransformer3DModel": ("WanLoraLoaderMixin", lambda name: "_attn." in name or "ffn." in name),
    "ZImageTransformer2DModel": ("ZImageLoraLoaderMixin", lambda name: "feed_forward" in name),
}


@pytest.mark.parametrize("class_name", LOADERS)
def test_a_lora_changes_every_layer_as_diffusers_loads_and_fuses_it(
    world: Callable[[str], World], class_name: str
):
    here = world(class_name)
    mixin, chosen = LOADERS[class_name]
    factors = {layer: pair for layer, pair in here.factors(1).items() if chosen(layer)}
    file = saved(here.folder / "lora.safetensors", peft_lora(factors, "diffusion_model."))
    theirs = getattr(loaders.lora_pipeline, mixin).lora_state_dict(str(file))
    assert_close(here.merged(file), fused(here, theirs))


def fused(here: World, state: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """What diffusers' loading and fusing adds to each weight, without those it leaves as they are."""
    model = type(here.model)(**TINY[here.class_name])
    model.load_state_dict(here.state)
    model.load_lora_adapter(dict(state), prefix="transformer", **kwargs)
    model.fuse_lora()
    model.unload_lora()
    added = {name: tensor - here.state[name] for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in added.items() if tensor.abs().max() > 1e-7}


MINIMAX = "MiniMaxH3Transformer3DModel"


def test_rows_head_by_head_are_told_by_diffsynths_names_as_diffusers_tells_them(tmp_path: Path):
    """diffusers takes 128 rows for a head."""
    config = TINY[MINIMAX] | {"attention_head_dim": 128, "rope_freq_dim": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, MINIMAX, config)
        here = World(MINIMAX, tmp_path)
        tensors = {
            name.replace(".weight", ".default.weight"): tensor
            for name, tensor in peft_lora(here.factors(2), "").items()
        }
        file = saved(tmp_path / "diffsynth.safetensors", tensors)
        loader: Any = loaders.lora_pipeline.MiniMaxH3LoraLoaderMixin
        theirs = loader.lora_state_dict(str(file))
        assert_close(here.merged(file), fused(here, theirs))
        stacked = saved(tmp_path / "stacked.safetensors", peft_lora(here.factors(2), ""))
        name = "transformer_blocks.0.attn.to_q.weight"
        assert not torch.equal(here.merged(stacked)[name], here.merged(file)[name])


def test_one_alpha_in_the_header_is_that_of_every_layer_as_diffusers_takes_it(world: Callable[[str], World]):
    here = world(MINIMAX)
    tensors = peft_lora(here.factors(3), "diffusion_model.")
    file = saved(here.folder / "alpha.safetensors", tensors, alpha="6")
    loader: Any = loaders.lora_pipeline.MiniMaxH3LoraLoaderMixin
    theirs, metadata = loader.lora_state_dict(str(file), return_lora_metadata=True)
    mine = here.merged(file)
    assert_close(mine, fused(here, theirs, metadata=metadata))
    plain = here.merged(saved(here.folder / "plain.safetensors", tensors))
    assert_close(mine, {name: 6 / RANK * tensor for name, tensor in plain.items()})


def dora(down: Tensor, up: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    turned = weight + up @ down
    lengths = torch.linspace(0.5, 2, len(weight)).unsqueeze(1)
    keys = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": lengths}
    return keys, turned * lengths / turned.norm(dim=1, keepdim=True) - weight


def loha(down: Tensor, up: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    keys = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up.flip(0), "hada_w2_b": down.flip(1)}
    return keys, (up @ down) * (up.flip(0) @ down.flip(1))


def lokr(down: Tensor, up: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    first, second = torch.randn(2, 2), torch.randn(len(up) // 2, down.shape[1] // 2)
    return {"lokr_w1": first, "lokr_w2": second}, torch.kron(first, second)


def difference(down: Tensor, up: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {"diff": up @ down}, up @ down


@pytest.mark.parametrize("kind", [dora, loha, lokr, difference])
@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv_proj", "blocks.0.mlp.fc1"], ids=["fused", "swapped"])
def test_every_kind_of_adapter_follows_the_rows(world: Callable[[str], World], layer: str, kind: Any):
    """Queries, keys and values of one matrix, and a gate that diffusers has below the values."""
    here = world(MINIMAX)
    weight = original_state(here.naming, here.state)[f"{layer}.weight"]
    keys, change = kind(*here.factors(4)[layer], weight)
    for name in (f"diffusion_model.{layer}", f"lora_unet_{layer.replace('.', '_')}"):
        file = saved(here.folder / "kind.safetensors", {f"{name}.{key}": t for key, t in keys.items()})
        assert_close(here.merged(file), converted(here, {layer: change}))


@pytest.mark.parametrize(
    ("class_name", "layer", "other"),
    [
        (
            "LTX2VideoTransformer3DModel",
            "patchify_proj",
            ("text_embedding_projection.aggregate_embed", "diffusion_model.video_embeddings_connector.x"),
        ),
        (
            "CosmosTransformer3DModel",
            "blocks.0.self_attn.q_proj",
            ("diffusion_model.llm_adapter.blocks.0.x", "lora_unet_llm_adapter_blocks_0_x"),
        ),
    ],
)
def test_what_is_for_another_part_of_the_pipeline_is_left_out_and_said(
    world: Callable[[str], World], class_name: str, layer: str, other: tuple[str, ...]
):
    here = world(class_name)
    pair = here.factors()[layer]
    tensors = peft_lora({f"diffusion_model.{layer}": pair} | dict.fromkeys(other, pair), "")
    file = saved(here.folder / "more.safetensors", {name: t.clone() for name, t in tensors.items()})
    warnings = merge_loras(here.source, [LoraFile(file, 1.0)]).warnings
    assert f"{file}: left out {2 * len(other)} tensors for the connectors" in warnings
    assert len(here.merged(file)) == 1
