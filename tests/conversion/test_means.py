"""The search step `means` from conversion to what is read of it: the checkpoint computes what the model did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.export import export
from svdq_cli.errors import InputError, UsageError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.lora.attach import load_lora, set_adapters
from svdq_cli.lora.fold import fold
from svdq_cli.lora.standalone import write_nunchaku_lora
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Calibration, Output, Quantization, default_recipe
from svdq_cli.records import ActivationStats
from svdq_cli.solve.means import common_mean, less_mean
from svdq_cli.source import open_source, read_tensor
from svdq_cli.source.means import moved_json, moved_of_json
from tests.adapters.test_loras import peft
from tests.lora.layers import FOUR_BIT, layer_output, relative, small_lora

READER = "transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(scope="module")
def moved(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one conversion in two formats, whose inputs have lost their means."""
    out = tmp_path_factory.mktemp("moved")
    prompts = out / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    recipe = default_recipe(
        str(tiny_flux),
        calibration=Calibration.model_validate(
            {"prompts": str(prompts), "samples": 2, "steps": 2, "height": 64, "width": 64, "rows": 128}
        ),
        quantization=Quantization.model_validate({"rank": 16, "effort": "fast", "search": ["means"]}),
        outputs=[
            Output.model_validate({"format": name, "path": str(out / file)}) for name, file in FILES.items()
        ],
    )
    convert(recipe, tuple(out / file for file in FILES.values()), options=RunOptions(device="cpu"))
    return out


FILES = {"nunchaku-lite": "lite", "nunchaku": "nunchaku.safetensors"}


def mean_of(checkpoint: Checkpoint, layer: str) -> torch.Tensor:
    return checkpoint.means()[layer]


@pytest.mark.parametrize("file", FILES.values())
def test_a_layer_gives_for_x_less_the_mean_what_the_model_gives_for_x(
    moved: Path, tiny_flux: Path, file: str
):
    checkpoint, source = open_checkpoint(moved / file), open_source(tiny_flux)
    mean = mean_of(checkpoint, READER)
    assert float(mean.norm()) > 0
    x = 3 * mean + torch.randn(64, len(mean), generator=torch.Generator().manual_seed(0))
    weight, bias = (read_tensor(source, f"{READER}.{part}").float() for part in ("weight", "bias"))
    exact = x @ weight.T + bias
    assert relative(layer_output(checkpoint, READER, x - mean), exact) < 0.2  # 4 bits
    assert relative(layer_output(checkpoint, READER, x), exact) > 0.3


@pytest.mark.parametrize("file", FILES.values())
def test_check_knows_the_biases_of_both_sides(moved: Path, tiny_flux: Path, file: str):
    assert check(moved / file, against=open_source(tiny_flux)).problems == ()


def test_an_export_keeps_what_was_moved(moved: Path, tiny_flux: Path, tmp_path: Path):
    out = tmp_path / "lite"
    export(moved / "nunchaku.safetensors", "nunchaku-lite", out, base=tiny_flux)
    before, after = open_checkpoint(moved / "lite"), open_checkpoint(out)
    assert moved_json(before.moved) == moved_json(after.moved)
    assert check(out, against=open_source(tiny_flux)).problems == ()


@pytest.mark.parametrize("file", FILES.values())
def test_a_folded_lora_has_its_part_of_the_mean(moved: Path, tmp_path: Path, file: str):
    layers = {
        name: shape for name, shape in FOUR_BIT.items() if name in (READER, "transformer_blocks.0.attn.to_v")
    }
    halves = small_lora(layers)
    lora = tmp_path / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in peft(halves).items()}, lora)
    out = tmp_path / file
    fold(moved / file, [LoraFile(lora, 0.5)], out)
    before, after = open_checkpoint(moved / file), open_checkpoint(out)
    for name in layers:
        down, up = halves[name]
        mean = mean_of(before, name)
        x = mean + torch.randn(16, len(mean), generator=torch.Generator().manual_seed(1))
        expected = layer_output(before, name, x - mean) + 0.5 * x @ down.T @ up.T
        assert relative(layer_output(after, name, x - mean), expected) < 5e-3, name


def test_a_loaded_lora_has_its_part_of_the_mean(moved: Path, tmp_path: Path):
    halves = small_lora({READER: FOUR_BIT[READER]})
    lora = tmp_path / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in peft(halves).items()}, lora)
    pipe = load_pipeline(moved / "lite", device=torch.device("cpu"), backend="reference")
    layer = pipe.transformer.get_submodule(READER)
    before = layer.branch.bias.float()
    load_lora(pipe, lora, "style")
    set_adapters(pipe, {"style": 0.5})
    down, up = halves[READER]
    mean = mean_of(open_checkpoint(moved / "lite"), READER)
    expected = 0.5 * mean @ down.T @ up.T
    assert relative(layer.branch.bias.float() - before, expected) < 0.02  # biases are rounded to 16 bits
    set_adapters(pipe, {})
    assert torch.equal(layer.branch.bias.float(), before)


def test_a_lora_file_for_a_base_without_means_is_refused(moved: Path, tmp_path: Path):
    lora = tmp_path / "lora.safetensors"
    halves = small_lora({READER: FOUR_BIT[READER]})
    save_file({name: tensor.contiguous() for name, tensor in peft(halves).items()}, lora)
    with pytest.raises(UsageError, match="holds the mean"):
        write_nunchaku_lora(
            moved / "nunchaku.safetensors", [LoraFile(lora, 1.0)], tmp_path / "out.safetensors"
        )


def test_a_damaged_header_is_said_to_be_one():
    for said in (["x"], [{"readers": [], "producers": [], "mean": "%"}], {"a": 1}, [{"mean": 3}]):
        with pytest.raises(InputError, match="can't be read"):
            moved_of_json(said)


def test_statistics_without_their_mean_are_those_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(512, 64, generator=generator) + 2).bfloat16()
    exact = rows.double()
    stats = ActivationStats(
        "x", exact.abs().amax(0).float() * 1.5, exact.square().mean(0).float(), rows, tokens_seen=512
    )
    mean = common_mean([stats], 64)
    assert mean is not None
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=2**-8, atol=0)
    less = less_mean(stats, mean)
    torch.testing.assert_close(less.rows.double(), exact - mean, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(
        less.second_moment.double(), (exact - mean.double()).square().mean(0), rtol=1e-3, atol=1e-3
    )
    # the largest token was 1.5 times the largest row, and still is
    assert bool((less.abs_max >= 1.49 * less.rows.float().abs().amax(0)).all())


def test_a_mean_of_next_to_nothing_is_none():
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    ones = torch.ones(64)
    assert common_mean([ActivationStats("x", ones, ones, rows, tokens_seen=4096)], 64) is None
