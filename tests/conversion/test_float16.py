"""float16 holds no number above 65,504: what does not fit is refused or warned of by layer; no black image passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.generate import generate
from svdq_cli.errors import CheckFailedError, InputError
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe

CPU = RunOptions(device="cpu")
V = ("transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_v_proj")
OUT = ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out")
FACTOR = 2.0**16


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def with_large_values(tensors: dict[str, Tensor]) -> None:
    """The same model: the values of an attention times a power of two, its output layers divided by it."""
    for name in V:
        tensors[f"{name}.weight"] *= FACTOR
        tensors[f"{name}.bias"] *= FACTOR
    for name in OUT:
        tensors[f"{name}.weight"] /= FACTOR


def recipe_for(source: Path, dtype: str, **quantization: object) -> Recipe:
    recipe = default_recipe(
        str(source),
        calibration=Calibration.model_validate(
            {"prompts": "calib_prompts/demo_eval.txt", "samples": 1, "steps": 1, "height": 32, "width": 32}
        ),
        quantization=Quantization.model_validate({"rank": 16, "effort": "fast", **quantization}),
    )
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


@pytest.fixture(scope="module")
def large(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tiny_flux, tmp_path_factory.mktemp("large") / "flux", with_large_values)


@pytest.fixture(scope="module")
def calibration(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "calib"
    calibrate(recipe_for(large, "float16"), out, options=CPU)
    return out


def test_calibration_keeps_the_largest_number_of_every_output(calibration: Path):
    entries = {entry.name: entry for entry in open_calibration(calibration).manifest.inputs}
    peaks = {layer: peak for entry in entries.values() for layer, peak in entry.output_peaks.items()}
    assert all(peaks[name] > 65504 for name in V)
    assert all(0 < peak < 1000 for name, peak in peaks.items() if name not in V)
    assert all((entry.peak or 0) > 65504 for name, entry in entries.items() if name in OUT)


def test_a_conversion_to_float16_names_the_layers_that_will_overflow(
    large: Path, calibration: Path, tmp_path: Path
):
    report = convert(recipe_for(large, "float16"), tmp_path / "out", calibration=calibration, options=CPU)
    (warning,) = [each for each in report.warnings if "float16" in each]
    assert "images will be black. Convert with dtype: bfloat16" in warning
    assert any(name in warning for name in V)
    # an output that is infinite is worth nothing, whatever float32 would have made of it
    assert all(report.layer_sqnr_db.per_layer[name] == -150.0 for name in V)
    recipe = evaluation_recipe(open_checkpoint(tmp_path / "out"), str(tmp_path / "out"))
    with pytest.raises(CheckFailedError, match="the image would be black") as refused:
        generate(tmp_path / "out", "a", tmp_path / "black.png", recipe=recipe, options=CPU)
    assert refused.value.kind == "not-finite"
    assert not (tmp_path / "black.png").exists()


def test_the_same_model_in_bfloat16_is_warned_of_nothing_and_generates(
    large: Path, calibration: Path, tmp_path: Path
):
    report = convert(recipe_for(large, "bfloat16"), tmp_path / "out", calibration=calibration, options=CPU)
    assert not [each for each in report.warnings if "float16" in each]
    assert report.layer_sqnr_db.min > 0
    recipe = evaluation_recipe(open_checkpoint(tmp_path / "out"), str(tmp_path / "out"))
    generate(tmp_path / "out", "a", tmp_path / "image.png", recipe=recipe, options=CPU)


@pytest.mark.parametrize("name", [f"{V[0]}.weight", f"{V[0]}.bias", "proj_out.weight", "x_embedder.bias"])
def test_a_tensor_that_float16_does_not_hold_is_refused_by_name(tiny_flux: Path, tmp_path: Path, name: str):
    def with_one_large(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = -70144.0

    source = changed(tiny_flux, tmp_path / "flux", with_one_large)
    with pytest.raises(
        InputError, match=f"{name} holds 70144, but the largest number of float16 is 65504"
    ) as refused:
        convert(recipe_for(source, "float16", effort="datafree"), tmp_path / "out", options=CPU)
    assert (refused.value.code, refused.value.kind, refused.value.where) == (3, "out-of-range", name)
    convert(recipe_for(source, "bfloat16", effort="datafree"), tmp_path / "fine", options=CPU)


def test_an_autoencoder_that_gives_nan_makes_no_image(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = Path(shutil.copytree(converted_flux("int4") / "lite", tmp_path / "own"))
    file = own / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["decoder.conv_out.weight"][0, 0, 0, 0] = float("nan")
    file.chmod(0o644)
    save_file(tensors, file, metadata={"format": "pt"})
    assert (
        run(["generate", str(own), "--prompt", "a", "-o", str(tmp_path / "x.png"), "--steps", "1", "-q"]) == 7
    )
    assert "the decoded image holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
