"""svdq's rules for original names make of every tensor, row by row, what diffusers' own converters make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import models
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor

from svdq_cli.source.configs import known_class
from svdq_cli.source.names import Naming, convert_names
from svdq_cli.source.original_names import FLUX1, FLUX2, LDM_UNET, NAMINGS, PIXART, SANA, SD3, Z_IMAGE
from tests.source.originals import MemoryTensor, original_state, real_keys, row_numbers

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


# The architecture at the published number of blocks (where that matters), without memory.
MODELS: tuple[tuple[Naming, dict[str, Any], Convert], ...] = (
    (FLUX1, {"guidance_embeds": True}, theirs.convert_flux_transformer_checkpoint_to_diffusers),
    (
        FLUX2,
        {"num_layers": 2, "num_single_layers": 3},
        theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
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


@pytest.mark.parametrize(("naming", "config", "convert"), MODELS, ids=[m[0].model_class for m in MODELS])
def test_rules_are_those_of_diffusers(naming: Naming, config: dict[str, Any], convert: Convert):
    with torch.device("meta"):
        model = getattr(models, naming.model_class)(**config)
    state = row_numbers({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    original = original_state(naming, state)
    unused = {name: torch.zeros(1, dtype=torch.float64) for name in naming.unused}
    assert frozenset(original) >= naming.signature
    assert_same(ours(naming, original), state)
    assert_same(state, convert({**original, **unused}))


def test_sd15_unet_rules_are_those_of_diffusers():
    with torch.device("meta"):
        model = models.UNet2DConditionModel(cross_attention_dim=768)
    state = row_numbers({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    original = original_state(LDM_UNET, state)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    assert_same(ours(LDM_UNET, original), state)
    assert_same(state, theirs.convert_ldm_unet_checkpoint(whole, {"layers_per_block": 2}))


def test_pixart_is_told_from_sana_and_loses_nothing():
    """diffusers' package has no converter for PixArt (its script is not installed), so the class alone is the judge."""
    with torch.device("meta"):
        model = models.PixArtTransformer2DModel(num_layers=2, use_additional_conditions=True)
    state = row_numbers({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
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
