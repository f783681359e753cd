"""svdq's rules for original names make of every tensor, row by row, what diffusers' own converters make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import models
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor

from svdq_cli.source.configs import known_class
from svdq_cli.source.names import Naming, convert_names
from svdq_cli.source.original_names import (
    CHROMA,
    FLUX1,
    FLUX2,
    HUNYUAN_VIDEO_15,
    LDM_UNET,
    NAMINGS,
    PIXART,
    SANA,
    SD3,
    WAN,
    Z_IMAGE,
    naming_of,
)
from tests.source.originals import (
    MemoryTensor,
    has_norm_scale,
    original_state,
    real_keys,
    row_numbers,
)

Convert = Callable[..., Mapping[str, Tensor]]


def ours(naming: Naming, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted, unknown = convert_names(
        naming, {name: MemoryTensor(tensor) for name, tensor in stored.items()}
    )
    assert unknown == ()
    return {name: entry.read() for name, entry in converted.items()}


def assert_same(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert sorted(mine) == sorted(other)
    different = [name for name in mine if not torch.equal(mine[name], other[name])]
    assert different == []


def test_flux1_dev_at_full_size():
    stored = row_numbers(real_keys("flux1-dev.bfl"))
    assert len(stored) == 780
    assert frozenset(stored) >= FLUX1.signature
    assert_same(ours(FLUX1, stored), theirs.convert_flux_transformer_checkpoint_to_diffusers(dict(stored)))


def test_sdxl_unet_at_full_size():
    stored = row_numbers(real_keys("sdxl-unet.ldm"))
    assert len(stored) == 1680
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    prefix = "model.diffusion_model."
    mine = ours(LDM_UNET, {name.removeprefix(prefix): tensor for name, tensor in stored.items()})
    assert_same(mine, theirs.convert_ldm_unet_checkpoint(dict(stored), config))


WAN_TINY = {"num_attention_heads": 2, "ffn_dim": 64, "text_dim": 32, "num_layers": 2}

# The architecture at the published number of blocks (where that matters), without memory.
MODELS: tuple[tuple[Naming, dict[str, Any], Convert], ...] = (
    (FLUX1, {"guidance_embeds": True}, theirs.convert_flux_transformer_checkpoint_to_diffusers),
    (
        FLUX2,
        {"num_layers": 2, "num_single_layers": 3},
        theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    (
        CHROMA,
        {"num_layers": 2, "num_single_layers": 3},
        theirs.convert_chroma_transformer_checkpoint_to_diffusers,
    ),
    (WAN, WAN_TINY, theirs.convert_wan_transformer_to_diffusers),
    (Z_IMAGE, {"n_layers": 3}, theirs.convert_z_image_transformer_checkpoint_to_diffusers),
    (SANA, {"num_layers": 3}, theirs.convert_sana_transformer_to_diffusers),
    (
        SD3,
        {
            "num_layers": 12,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0, 1, 2),
            "caption_projection_dim": 1152,
            "out_channels": 16,
        },
        theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
)


def state_of(model_class: str, **config: Any) -> dict[str, Tensor]:
    """A model's names with a number for each row of its tensors."""
    with torch.device("meta"):
        model = getattr(models, model_class)(**config)
    return row_numbers({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize(("naming", "config", "convert"), MODELS, ids=[m[0].model_class for m in MODELS])
def test_rules_are_those_of_diffusers(naming: Naming, config: dict[str, Any], convert: Convert):
    state = state_of(naming.model_class, **config)
    original = original_state(naming, state)
    unused = {name: torch.zeros(1, dtype=torch.float64) for name in naming.unused}
    assert frozenset(original) >= naming.signature
    assert_same(ours(naming, original), state)
    assert_same(state, convert({**original, **unused}))


SHORT = {"num_layers": 2}
# Classes that a base tells, whose files diffusers converts: what LoRAs are read with has the same rules
BASED: dict[str, tuple[dict[str, Any], Convert]] = {
    "Flux3Transformer2DModel": (
        {**SHORT, "num_single_layers": 2, "flow_map": True},
        theirs.convert_flux3_transformer_checkpoint_to_diffusers,
    ),
    "Krea2Transformer2DModel": (SHORT, theirs.convert_krea2_transformer_checkpoint_to_diffusers),
    "MiniMaxH3Transformer3DModel": (
        SHORT,
        partial(theirs.convert_minimax_h3_transformer_checkpoint_to_diffusers, config={}),
    ),
    "HunyuanVideoTransformer3DModel": (
        {**SHORT, "num_single_layers": 2},
        theirs.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "LTXVideoTransformer3DModel": (SHORT, theirs.convert_ltx_transformer_checkpoint_to_diffusers),
    "LTX2VideoTransformer3DModel": (SHORT, theirs.convert_ltx2_transformer_to_diffusers),
    "Lumina2Transformer2DModel": (SHORT, theirs.convert_lumina2_to_diffusers),
    "CosmosTransformer3DModel": (
        {**SHORT, "extra_pos_embed_type": None},
        theirs.convert_cosmos_transformer_checkpoint_to_diffusers,
    ),
    "AuraFlowTransformer2DModel": (
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
        theirs.convert_auraflow_transformer_checkpoint_to_diffusers,
    ),
    # its converter knows the published number of blocks alone
    "MochiTransformer3DModel": ({}, theirs.convert_mochi_transformer_checkpoint_to_diffusers),
    "QwenImage21Transformer2DModel": (SHORT, theirs.convert_qwen_image21_transformer_checkpoint_to_diffusers),
}


@pytest.mark.parametrize("model_class", BASED)
def test_rules_for_loras_are_those_of_diffusers_for_files(model_class: str):
    config, convert = BASED[model_class]
    naming = naming_of(model_class)
    assert naming is not None
    state = state_of(model_class, **config)
    # HunyuanVideo's own norms have weights, ComfyUI's scales
    scales = (lambda _: False) if model_class.startswith("Hunyuan") else has_norm_scale
    original = original_state(naming, state, scales)
    assert frozenset(original) >= naming.signature
    assert_same(ours(naming, original), state)
    converted = {name: tensor.flatten() for name, tensor in convert(checkpoint=dict(original)).items()}
    assert_same(state, converted)


HUNYUAN_15 = {
    "double_blocks.1.img_attn_q.weight": "transformer_blocks.1.attn.to_q.weight",
    "double_blocks.1.txt_attn_v.bias": "transformer_blocks.1.attn.add_v_proj.bias",
    "double_blocks.0.txt_attn_k_norm.weight": "transformer_blocks.0.attn.norm_added_k.weight",
    "double_blocks.0.img_attn_proj.weight": "transformer_blocks.0.attn.to_out.0.weight",
    "double_blocks.0.txt_attn_proj.weight": "transformer_blocks.0.attn.to_add_out.weight",
    "double_blocks.0.img_mlp.fc1.weight": "transformer_blocks.0.ff.net.0.proj.weight",
    "double_blocks.0.txt_mlp.fc2.weight": "transformer_blocks.0.ff_context.net.2.weight",
    "double_blocks.0.txt_mod.linear.bias": "transformer_blocks.0.norm1_context.linear.bias",
    "img_in.proj.weight": "x_embedder.proj.weight",
    "time_in.mlp.2.weight": "time_embed.timestep_embedder.linear_2.weight",
    "txt_in.input_embedder.weight": "context_embedder.proj_in.weight",
    "txt_in.c_embedder.linear_1.weight": "context_embedder.time_text_embed.text_embedder.linear_1.weight",
    "txt_in.t_embedder.mlp.0.weight": "context_embedder.time_text_embed.timestep_embedder.linear_1.weight",
    "byt5_in.layernorm.weight": "context_embedder_2.norm.weight",
    "byt5_in.fc3.weight": "context_embedder_2.linear_3.weight",
    "vision_in.proj.3.weight": "image_embedder.linear_2.weight",
    "cond_type_embedding.weight": "cond_type_embed.weight",
    "final_layer.linear.weight": "proj_out.weight",
}


def test_hunyuan_video_15_is_named_as_in_diffusers_conversion_script():
    """The package has no converter for it, so names that its script gives are written here."""
    state = state_of("HunyuanVideo15Transformer3DModel", num_layers=2)
    original = original_state(HUNYUAN_VIDEO_15, state, lambda _: False)
    assert frozenset(original) >= HUNYUAN_VIDEO_15.signature
    for old, new in HUNYUAN_15.items():
        assert torch.equal(original[old], state[new])
    swapped = original["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(torch.cat(swapped.chunk(2)[::-1]), state["norm_out.linear.weight"])
    assert_same(ours(HUNYUAN_VIDEO_15, original), state)


def test_sd15_unet_rules_are_those_of_diffusers():
    state = state_of("UNet2DConditionModel", cross_attention_dim=768)
    original = original_state(LDM_UNET, state)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    assert_same(ours(LDM_UNET, original), state)
    assert_same(state, theirs.convert_ldm_unet_checkpoint(whole, {"layers_per_block": 2}))


SDXL_STAGES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
}
SMALLER_SDXL = {
    "SSD-1B": {
        "transformer_layers_per_block": [0, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": {"transformer_layers_per_block": [1, 1, 2]},
    "KOALA 700M": {"transformer_layers_per_block": [0, 2, 5], "layers_per_block": 1, "mid_block_type": None},
}


@pytest.mark.parametrize("name", SMALLER_SDXL)
def test_unets_with_parts_cut_out_have_the_rules_of_ldm(name: str):
    config = {"layers_per_block": 2, **SDXL_STAGES, **SMALLER_SDXL[name]}
    state = state_of("UNet2DConditionModel", **config)
    original = original_state(LDM_UNET, state)
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in original.items()}
    assert frozenset(original) >= LDM_UNET.signature
    assert_same(ours(LDM_UNET, original), state)
    assert_same(state, theirs.convert_ldm_unet_checkpoint(whole, config))


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        ("WanTransformer3DModel", {"image_dim": 32, "added_kv_proj_dim": 256, "in_channels": 36}),
        ("WanVACETransformer3DModel", {"vace_layers": [0, 1], "vace_in_channels": 96}),
        ("SkyReelsV2Transformer3DModel", {}),
    ],
    ids=["from an image", "VACE", "SkyReels"],
)
def test_what_was_made_from_wan_has_the_rules_of_wan(model_class: str, config: dict[str, Any]):
    state = state_of(model_class, **WAN_TINY, **config)
    original = original_state(WAN, state)
    assert frozenset(original) >= WAN.signature
    assert_same(ours(WAN, original), state)
    assert_same(state, theirs.convert_wan_transformer_to_diffusers(dict(original)))


def test_wan_between_two_images_has_positions_that_diffusers_leaves_under_their_name():
    """diffusers' conversion script knows this tensor, the converter in its package does not."""
    image = {"image_dim": 32, "added_kv_proj_dim": 256, "pos_embed_seq_len": 4}
    state = state_of("WanTransformer3DModel", **WAN_TINY, **image)
    original = original_state(WAN, state)
    converted = ours(WAN, original)
    assert_same(converted, state)
    theirs_too = dict(theirs.convert_wan_transformer_to_diffusers(dict(original)))
    positions = theirs_too.pop("img_emb.emb_pos")
    assert_same(converted, {**theirs_too, "condition_embedder.image_embedder.pos_embed": positions})


SANA_BLOCK = {
    "blocks.1.attn.q_norm.weight": "transformer_blocks.1.attn1.norm_q.weight",
    "blocks.1.attn.k_norm.weight": "transformer_blocks.1.attn1.norm_k.weight",
    "blocks.1.cross_attn.q_norm.weight": "transformer_blocks.1.attn2.norm_q.weight",
    "blocks.1.cross_attn.k_norm.weight": "transformer_blocks.1.attn2.norm_k.weight",
}
SPRINT = {
    "t_embedder.mlp.0.weight": "time_embed.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.2.bias": "time_embed.timestep_embedder.linear_2.bias",
    "cfg_embedder.mlp.0.bias": "time_embed.guidance_embedder.linear_1.bias",
    "cfg_embedder.mlp.2.weight": "time_embed.guidance_embedder.linear_2.weight",
}
SANA15 = {
    "t_embedder.mlp.0.weight": "time_embed.emb.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.2.bias": "time_embed.emb.timestep_embedder.linear_2.bias",
}


@pytest.mark.parametrize(
    ("guided", "names"), [(False, SANA15), (True, SPRINT)], ids=["SANA 1.5", "SANA-Sprint"]
)
def test_sana_15_and_sprint_are_named_as_in_diffusers_conversion_script(guided: bool, names: dict[str, str]):
    """The converter in diffusers' package drops their norms, so the names that its script gives are written here."""
    config = {"num_layers": 2, "qk_norm": "rms_norm_across_heads", "guidance_embeds": guided}
    state = state_of("SanaTransformer2DModel", **config)
    original = original_state(SANA, state)
    for old, new in {**SANA_BLOCK, **names}.items():
        assert torch.equal(original[old], state[new])
    training_only = {f"logvar_linear.{name}": torch.zeros(1) for name in ("weight", "bias")}
    assert_same(ours(SANA, {**original, **training_only}), state)


def test_pixart_is_told_from_sana_and_loses_nothing():
    """diffusers' package has no converter for PixArt (its script is not installed), so the class alone is the judge."""
    state = state_of("PixArtTransformer2DModel", num_layers=2, use_additional_conditions=True)
    original = original_state(PIXART, state)
    assert frozenset(original) >= PIXART.signature
    assert not frozenset(original) >= SANA.signature
    qkv = original["blocks.1.attn.qkv.weight"]
    assert torch.equal(qkv[:1152], state["transformer_blocks.1.attn1.to_q.weight"])
    assert torch.equal(qkv[2304:], state["transformer_blocks.1.attn1.to_v.weight"])
    assert_same(ours(PIXART, original), state)


def test_every_naming_belongs_to_a_class_whose_config_can_be_told():
    for naming in NAMINGS:
        assert known_class(naming.model_class).model_class == naming.model_class


def test_an_unknown_layer_is_reported_not_dropped():
    stored = {name: MemoryTensor(tensor) for name, tensor in row_numbers(real_keys("flux1-dev.bfl")).items()}
    _, unknown = convert_names(
        FLUX1, {**stored, "double_blocks.3.extra.weight": MemoryTensor(torch.zeros(2))}
    )
    assert unknown == ("double_blocks.3.extra.weight",)
