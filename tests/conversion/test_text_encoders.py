"""Text encoders with 4-bit weights in an output: made, reported, checked, loaded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.entrypoints.inspect import inspect_checkpoint
from svdq_cli.errors import EnvironmentLacksError, InterruptedRunError, UsageError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Calibration, Output, Quantization, Recipe, default_recipe
from svdq_cli.records import Event
from svdq_cli.reports import ConvertReport

BOTH = ("text_encoder", "text_encoder_2")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def recipe_of(source: Path, effort: str, components: tuple[str, ...] = BOTH) -> Recipe:
    quantization = Quantization.model_validate({"effort": effort, "rank": 16})
    recipe = default_recipe(str(source), quantization=quantization)
    return recipe.model_copy(update={"components": components})


def calibrated_recipe(source: Path, folder: Path) -> Recipe:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a photo of {count} red circles" for count in range(16)))
    asked = {"prompts": str(prompts), "samples": 16, "steps": 1, "height": 32, "width": 32}
    calibration = Calibration.model_validate({**asked, "max_sequence_length": 16, "batch_size": 16})
    return recipe_of(source, "fast").model_copy(update={"calibration": calibration})


@pytest.fixture(scope="module")
def made(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConvertReport]:
    """Calibrated, with both encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    recipe = calibrated_recipe(tiny_flux, folder)
    return folder / "out", convert(recipe, folder / "out", options=RunOptions(device="cpu"))


def test_the_report_says_size_and_how_near_each_encoder_is(made: tuple[Path, ConvertReport]):
    out, report = made
    assert tuple(report.text_encoders) == BOTH
    for name, facts in report.text_encoders.items():
        assert facts.calibrated
        assert facts.w4a16 > 0
        assert facts.hidden_sqnr_db is not None
        assert facts.hidden_sqnr_db.last > 15
        weights = out / name / "model.safetensors"
        assert facts.bytes.output <= weights.stat().st_size <= facts.bytes.output + 16_384  # its header
        assert (
            f"| {name.replace('_', chr(92) + '_')} |" in (out / "README.md").read_text()
            or name in (out / "README.md").read_text()
        )
    assert not [warning for warning in report.warnings if "encoder" in warning]
    stored = json.loads((out / "svdq_report.json").read_text())
    assert set(stored["text_encoders"]["text_encoder"]) == {
        "class",
        "bytes",
        "w4a16",
        "kept",
        "calibrated",
        "layer_sqnr_db",
        "hidden_sqnr_db",
    }


def test_a_run_that_dies_in_the_second_encoder_goes_on_with_it_to_the_same_bytes(
    made: tuple[Path, ConvertReport], tiny_flux: Path, tmp_path: Path
):
    recipe, out = calibrated_recipe(tiny_flux, made[0].parent), tmp_path / "out"
    begun: list[str] = []

    def die(event: Event) -> None:
        if event.stage == "encoder" and event.kind == "start":
            begun.append(event.detail)
        if event.stage == "encoder" and event.kind == "advance" and begun == list(BOTH):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="interrupted"):
        convert(recipe, out, options=RunOptions(device="cpu"), observe=die)
    kept = tmp_path / ".out.work" / "encoders"
    assert sorted(path.name for path in kept.iterdir()) == ["text_encoder.json", "text_encoder.safetensors"]
    begun.clear()
    again = RunOptions(device="cpu", resume=True)
    report = convert(recipe, out, options=again, observe=lambda event: _note(begun, event))
    assert begun == ["text_encoder_2"]
    for name in BOTH:
        written, expected = (folder / name / "model.safetensors" for folder in (out, made[0]))
        assert written.read_bytes() == expected.read_bytes()
    assert report.text_encoders == made[1].text_encoders


def _note(begun: list[str], event: Event) -> None:
    if event.stage == "encoder" and event.kind == "start":
        begun.append(event.detail)


def test_plan_and_inspect_know_the_same_sizes(made: tuple[Path, ConvertReport], tiny_flux: Path):
    out, report = made
    plan = predict(recipe_of(tiny_flux, "datafree"), options=RunOptions(device="cpu"))
    inspected = inspect_checkpoint(out).text_encoders
    for name, facts in report.text_encoders.items():
        assert plan.text_encoders[name].bytes == facts.bytes
        assert inspected[name].bytes == facts.bytes
        assert inspected[name].w4a16 == facts.w4a16


def test_check_reads_the_encoders_too(made: tuple[Path, ConvertReport], tiny_flux: Path, tmp_path: Path):
    import shutil

    source = source_of(default_recipe(str(tiny_flux)), RunOptions())
    found = check(made[0], against=source)
    assert (found.status, found.text_encoders) == ("ok", BOTH)
    own = Path(shutil.copytree(made[0], tmp_path / "own"))
    file = own / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if key.endswith("wi_0.weight"))
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    (problem,) = check(own, against=source).problems
    assert (problem.layer, problem.what) == (
        f"text_encoder_2: {name}",
        "its weight does not match the source's",
    )
    del weights[f"{name}.absmax"]
    save_file(weights, file, metadata={"format": "pt"})
    (problem,) = check(own).problems
    assert problem.what == "absmax is missing"


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_the_pipeline_generates(made: tuple[Path, ConvertReport]):
    pipe = load_pipeline(made[0], device="cpu")
    assert pipe.text_encoder_2.is_loaded_in_4bit
    settings = SamplingSettings(steps=1, guidance=1.0, height=32, width=32, seed=0, max_sequence_length=16)
    (image,) = generate_images(pipe, ["a red circle"], settings=settings)
    assert image.size == (32, 32)


def test_without_bitsandbytes_loading_says_what_to_install(
    made: tuple[Path, ConvertReport], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacksError, match="need the package bitsandbytes"):
        load_pipeline(made[0], device="cpu")


def test_data_free_says_so(tiny_flux: Path, tmp_path: Path):
    report = convert(
        recipe_of(tiny_flux, "datafree", BOTH[1:]), tmp_path / "out", options=RunOptions(device="cpu")
    )
    (facts,) = report.text_encoders.values()
    assert not facts.calibrated
    assert facts.hidden_sqnr_db is None
    assert not (tmp_path / ".out.work").exists()


def test_statistics_without_prompts_leave_the_encoders_to_nearest_and_say_so(tiny_flux: Path, tmp_path: Path):
    recipe = calibrated_recipe(tiny_flux, tmp_path)
    calibrate(recipe, tmp_path / "calib", options=RunOptions(device="cpu"))
    warnings: list[str] = []

    def observe(event: Event) -> None:
        if event.kind == "warning":
            warnings.append(event.detail)

    promptless = recipe.model_copy(update={"calibration": None, "components": BOTH[1:]})
    options = RunOptions(device="cpu")
    report = convert(
        promptless, tmp_path / "out", calibration=tmp_path / "calib", options=options, observe=observe
    )
    assert not report.text_encoders["text_encoder_2"].calibrated
    (said,) = (warning for warning in warnings if warning.startswith("text_encoder_2"))
    assert "there are no prompts" in said
    assert said in report.warnings


def test_single_files_have_no_place_for_an_encoder(tiny_flux: Path):
    recipe = recipe_of(tiny_flux, "datafree", BOTH[1:])
    single = recipe.model_copy(update={"outputs": (Output(format="nunchaku", path="out.safetensors"),)})
    with pytest.raises(UsageError, match="text_encoder_2 would be lost"):
        prepare(single)


def test_recipes_may_still_map_encoders_to_w4a16():
    plain = {"version": 1, "model": {"source": "m"}, "components": {"text_encoder_2": "w4a16"}}
    assert Recipe.model_validate(plain).components == ("text_encoder_2",)
