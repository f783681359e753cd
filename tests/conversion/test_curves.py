"""`modulation` of a recipe: what becomes of the layers that only modulate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.errors import UsageError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Calibration, Output, Quantization, Recipe, default_recipe
from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution, W4A16Plan
from svdq_cli.reports import ConvertReport
from svdq_cli.solve.forward import output_sqnr_db
from svdq_cli.solve.modulation import solve_curve, solve_w4a16
from svdq_cli.solve.rebuild import curve_error
from svdq_cli.source import open_source
from tests.tiny_families import tiny_pipeline

CPU = RunOptions(device="cpu")


def embedded(times: torch.Tensor, k: int) -> torch.Tensor:
    """(T, K): what a time embedder makes of timesteps, a smooth curve."""
    generator = torch.Generator().manual_seed(3)
    frequencies = torch.exp(-torch.arange(32) / 4)
    waves = torch.cat([(times[:, None] * frequencies).sin(), (times[:, None] * frequencies).cos()], 1)
    return silu(waves @ torch.randn(64, k, generator=generator) / 8)


# ------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("precision", [Int4(), NvFp4()])
def test_a_curve_holds_the_layer_at_timesteps_that_it_was_not_solved_for(precision: Precision):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(512, 256, generator=generator), torch.randn(512, generator=generator)
    linear = Linear("norm.linear", 256, 512, bias=True)
    seen, unseen = (
        embedded(torch.linspace(0, 6, 128), 256),
        embedded(torch.rand(50, generator=generator) * 6, 256),
    )
    curve = solve_curve(W4A4Plan(linear, precision, 32, curve=True), weight, bias, seen, dtype=torch.bfloat16)
    nearest = solve_w4a16(W4A16Plan(linear), weight, bias, dtype=torch.bfloat16)
    assert not curve.codes.any()
    found = output_sqnr_db(unseen, weight, curve)
    assert found > 40  # bfloat16 alone leaves about 48
    assert found > output_sqnr_db(unseen, weight, nearest) + 10


def test_a_curve_of_fewer_timesteps_than_ranks_is_whole():
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
    seen = embedded(torch.linspace(0, 6, 5), 128)
    plan = W4A4Plan(Linear("x", 128, 128, bias=False), Int4(), 32, curve=True)
    curve = solve_curve(plan, weight, None, seen, dtype=torch.bfloat16)
    assert curve.up.shape == (128, 32)
    assert curve.down.shape == (32, 128)
    assert output_sqnr_db(seen, weight, curve) > 40


def test_the_check_knows_a_curve_from_the_branch_of_another_weight():
    generator = torch.Generator().manual_seed(2)
    weight, other = torch.randn(2, 256, 128, generator=generator)
    plan = W4A4Plan(Linear("x", 128, 256, bias=False), Int4(), 16, curve=True)
    curve = solve_curve(plan, weight, None, embedded(torch.linspace(0, 6, 64), 128), dtype=torch.bfloat16)
    assert curve_error(curve, weight) < 0.01  # the rounding of up and down to bfloat16
    assert curve_error(curve, other) > 1
    assert curve_error(replace(curve, down=curve.down.roll(1, 1)), weight) > 0.5


# ------------------------------------------------------------------------------------------------------ the recipe


def recipe_of(source: Path, modulation: str, out: Path, *, calibrated: bool = True, **output: str) -> Recipe:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    sampling = {"prompts": str(prompts), "samples": 2, "steps": 2, "height": 32, "width": 32, "rows": 64}
    recipe = default_recipe(
        str(source),
        calibration=Calibration.model_validate(sampling) if calibrated else None,
        quantization=Quantization.model_validate({"rank": 16, "effort": "fast"}),
        outputs=[Output.model_validate({"format": "nunchaku-lite", "path": str(out), **output})],
    )
    return recipe.model_copy(update={"modulation": modulation})


def converted(source: Path, modulation: str, out: Path, **more: object) -> ConvertReport:
    return convert(recipe_of(source, modulation, out, **more), out, options=CPU)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image: its modulations depend on the timestep alone."""
    folder = tiny_pipeline("qwen-image", tmp_path_factory.mktemp("qwen") / "model")
    spread_over_time(folder)
    return folder


def spread_over_time(folder: Path) -> None:
    """A random time embedder hears mostly the fastest waves of its 256, which no trained one does."""
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = "time_text_embed.timestep_embedder.linear_1.weight"
    tensors[name] = tensors[name] * torch.exp(-torch.arange(128) / 16).flip(0).repeat(2).to(
        tensors[name].dtype
    )
    save_file(tensors, file, {"format": "pt"})


MODULATIONS = ("transformer_blocks.0.img_mod.1", "transformer_blocks.0.txt_mod.1")


@pytest.fixture(scope="module")
def curves(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConvertReport]:
    out = tmp_path_factory.mktemp("curves") / "out"
    return out, converted(qwen, "curve", out)


def test_layers_that_read_only_the_timestep_become_curves(
    qwen: Path, curves: tuple[Path, ConvertReport], tmp_path: Path
):
    out, report = curves
    assert report.warnings == ()
    assert report.layers.w4a16 == 0
    opened = open_checkpoint(out)
    for name in MODULATIONS:
        solution = opened.solution(opened.plan().by_name[name])
        assert isinstance(solution, W4A4Solution)
        assert not solution.codes.any()
        per_layer = report.layer_sqnr_db.per_layer
        assert per_layer[name] > 35
    assert check(out, against=open_source(qwen)).status == "ok"
    assert converted(qwen, "w4a16", tmp_path / "w4a16").layers.w4a16 == len(MODULATIONS)


def test_a_model_with_curves_generates(curves: tuple[Path, ConvertReport]):
    pipe = load_pipeline(curves[0])
    images = pipe("a dog", num_inference_steps=2, height=32, width=32, output_type="np").images  # pyright: ignore
    assert torch.from_numpy(images).isfinite().all()


def test_the_calibration_keeps_what_the_timestep_makes_of_an_input(
    qwen: Path, curves: tuple[Path, ConvertReport], tmp_path: Path
):
    out, calibration = tmp_path / "out", tmp_path / "calib"
    calibrate(recipe_of(qwen, "auto", out), calibration, options=CPU)
    convert(recipe_of(qwen, "curve", out), out, calibration=calibration, options=CPU)
    first, again = (
        load_file(next((path / "transformer").glob("*.safetensors"))) for path in (curves[0], out)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_layers_that_read_the_text_too_stay_w4a16_and_it_is_said(tiny_flux: Path, tmp_path: Path):
    report = converted(tiny_flux, "curve", tmp_path / "out")
    assert report.layers.w4a16 > 0
    assert "no modulation layer of this model depends on the timestep alone" in report.warnings[-1]


def test_auto_takes_no_curve_where_it_would_be_larger(qwen: Path, tmp_path: Path):
    assert converted(qwen, "auto", tmp_path / "out").layers.w4a16 == len(MODULATIONS)


def test_keep_leaves_modulation_at_16_bits(qwen: Path, tmp_path: Path):
    report = converted(qwen, "keep", tmp_path / "out", calibrated=False)
    assert report.layers.w4a16 == 0
    assert any("the recipe keeps modulation" in warning for warning in report.warnings)


def test_a_curve_without_calibration_is_refused(qwen: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="there is no calibration"):
        converted(qwen, "curve", tmp_path / "out", calibrated=False)
    with pytest.raises(UsageError, match="there is no calibration"):
        predict(recipe_of(qwen, "curve", tmp_path / "out", calibrated=False), options=CPU)


def test_a_format_that_can_hold_no_curve_is_named(tiny_flux: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    report = converted(tiny_flux, "curve", out, format="nunchaku")
    assert "format nunchaku can't hold a curve" in report.warnings[-1]
