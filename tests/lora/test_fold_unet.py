"""LoRAs of UNet trainers: old attention processors, kohya, numbered layers; convolutions and layers kept at 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.lora.fold import fold
from tests.adapters.test_loras import Halves, kohya_unet, numbered, old_diffusers
from tests.entrypoints.test_export import converted_alone
from tests.lora.layers import layer_output, probes, relative, small_lora
from tests.lora.test_fold import saved
from tests.tiny_families import tiny_pipeline

BLOCKS = (
    "down_blocks.1.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "mid_block.attentions.0",
)
# in the order in which cloneofsimo's trainer numbers them
IN_BLOCK = (
    *(f"attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    *(f"attn2.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
)
LAYERS = [f"{block}.transformer_blocks.0.{layer}" for block in BLOCKS for layer in IN_BLOCK]


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    source = tiny_pipeline("sd15", folder / "source") / "unet"
    return converted_alone(source, folder / "lite", "nunchaku-lite", "int4")


@pytest.mark.parametrize("names", [old_diffusers, kohya_unet, numbered])
def test_unet_namings_are_folded(
    unet: Path, tmp_path: Path, names: Callable[[Mapping[str, Halves]], dict[str, Tensor]]
):
    before = open_checkpoint(unet)
    shapes = {name: before.state[f"{name}.weight"] for name in LAYERS}
    adapter = small_lora({name: (shape[0], shape[1]) for name, shape in shapes.items()})
    report = fold(unet, [LoraFile(saved(tmp_path / "lora.safetensors", names(adapter)))], tmp_path / "out")
    after = open_checkpoint(tmp_path / "out")
    for name, (down, up) in adapter.items():
        x = probes(down.shape[1])
        expected = layer_output(before, name, x) + x @ down.T @ up.T
        assert relative(layer_output(after, name, x), expected) < 2e-3, name  # attn2's k and v are merged
    assert {row.how for row in report.keys} == {"applied", "merged"}


def test_a_convolution_is_merged(unet: Path, tmp_path: Path):
    name = "down_blocks.0.resnets.0.conv1"
    before = open_checkpoint(unet)
    rows, *rest = before.state[f"{name}.weight"]
    (down, up) = small_lora({name: (rows, rest[0] * 9)})[name]
    halves = {name: (down.reshape(4, *rest), up.reshape(rows, 4, 1, 1))}
    lora = saved(tmp_path / "lora.safetensors", kohya_unet(halves))
    (row,) = fold(unet, [LoraFile(lora, 0.5)], tmp_path / "out").keys
    assert row.how == "merged"
    found = open_checkpoint(tmp_path / "out").kept_tensor(f"{name}.weight").float()
    expected = before.kept_tensor(f"{name}.weight").float() + 0.5 * (up @ down).reshape(found.shape)
    assert relative(found, expected) < 2e-3
