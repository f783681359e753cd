"""Pipelines that edit pictures or draw videos are calibrated by the same hooks; the recipe names what they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError, UsageError
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.source import open_source
from tests.tiny_families import tiny_pipeline

CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, of another size than what is drawn, and a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (48, 40), color).save(folder / name)
    mask = folder.parent / "mask.png"
    Image.new("L", (48, 40), 255).save(mask)
    return folder


@pytest.fixture(scope="module", params=["flux-kontext", "flux-fill"])
def editor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def recipe_for(folder: Path, **inputs: object) -> Recipe:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("make it red\nmake it blue\n")
    calibration = Calibration.model_validate(
        {
            "prompts": str(prompts),
            **{"samples": 2, "steps": 2, "height": 32, "width": 32, "max_sequence_length": 16, "rows": 128},
            **inputs,
        }
    )
    quantization = Quantization.model_validate({"rank": 16, "smoothing": "closed-form"})
    return default_recipe(str(folder), calibration=calibration, quantization=quantization)


def inputs_of(editor: Path, images: Path) -> dict[str, object]:
    given: dict[str, object] = {"image": str(images)}
    return given | ({"mask": str(images.parent / "mask.png")} if editor.name == "flux-fill" else {})


def test_an_editing_pipeline_is_calibrated_on_the_images_that_the_recipe_names(
    editor: Path, images: Path, tmp_path: Path
):
    recipe = recipe_for(editor, **inputs_of(editor, images))
    calibrate(recipe, tmp_path / "calib", options=CPU)
    opened = open_calibration(tmp_path / "calib")
    settings = opened.manifest.facts.settings
    assert [Path(file.path).name for file in settings.image] == ["a.png", "b.png"]
    latents = 8 * 8  # 32 pixels, 4 a token
    seen = opened.stats("transformer_blocks.0.attn.to_q").tokens_seen
    # Kontext reads the picture as tokens beside the ones it draws, Fill as channels of the same tokens
    assert seen == 2 * 2 * latents * (2 if editor.name == "flux-kontext" else 1)
    report = convert(recipe, tmp_path / "out", calibration=tmp_path / "calib", options=CPU)
    assert report.status == "ok"
    assert check(tmp_path / "out", against=open_source(editor)).status == "ok"


def test_other_images_give_another_calibration_and_their_place_does_not(images: Path, tmp_path: Path):
    folder = tiny_pipeline("flux-kontext", tmp_path / "flux-kontext")
    moved, other = tmp_path / "moved", tmp_path / "other"
    for target, color in ((moved, "red"), (other, "green")):
        target.mkdir()
        Image.new("RGB", (48, 40), color).save(target / "a.png")
    digests = []
    for image in (images / "a.png", moved, other):
        out = tmp_path / f"calib-{len(digests)}"
        calibrate(recipe_for(folder, image=str(image)), out, options=CPU)
        digests.append(json.loads((out / "manifest.json").read_text())["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_missing_input_is_named(tmp_path: Path):
    folder = tiny_pipeline("flux-fill", tmp_path / "flux-fill")
    with pytest.raises(
        UsageError, match="FluxFillPipeline could not generate without image and mask"
    ) as caught:
        calibrate(recipe_for(folder), tmp_path / "calib", options=CPU)
    assert "image and mask under calibration" in str(caught.value.hint)


def test_an_error_that_has_nothing_to_do_with_an_optional_input_does_not_blame_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """FluxKontextPipeline takes an image and does without one."""
    pipe = load_source_pipeline(tiny_pipeline("flux-kontext", tmp_path / "m"), dtype=torch.float32)
    settings = SamplingSettings(steps=1, guidance=1.0, height=32, width=32, seed=0, max_sequence_length=24)

    def failing(said: str) -> Callable[..., None]:
        def forward(*_: object, **__: object) -> None:
            raise ValueError(said)

        return forward

    for said, raised in (
        ("of a deep layer", ValueError),
        ("expected a tensor, got None", UsageError),
        ("give an image", UsageError),
    ):
        monkeypatch.setattr(pipe.transformer, "forward", failing(said))
        with pytest.raises(raised, match=said) as caught:
            generate_images(pipe, ["a cat"], settings=settings)
        assert ("without image" in str(caught.value)) == (raised is UsageError)


def test_an_input_that_the_pipeline_does_not_take_is_refused(tiny_flux: Path, images: Path, tmp_path: Path):
    recipe = recipe_for_copy(tiny_flux, tmp_path, image=str(images))
    with pytest.raises(UsageError, match="FluxPipeline takes no image"):
        calibrate(recipe, tmp_path / "calib", options=CPU)


def recipe_for_copy(folder: Path, beside: Path, **inputs: object) -> Recipe:
    recipe = recipe_for(beside / "unused", **inputs)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": str(folder)})})


def test_a_folder_without_images_is_refused(tiny_flux: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in this folder"):
        calibrate(
            recipe_for_copy(tiny_flux, tmp_path, image=str(tmp_path / "empty")), tmp_path / "c", options=CPU
        )
    with pytest.raises(InputError, match="no such file"):
        calibrate(
            recipe_for_copy(tiny_flux, tmp_path, image=str(tmp_path / "nowhere")), tmp_path / "c", options=CPU
        )


def test_a_video_pipeline_of_an_unknown_family_is_planned_and_calibrated(tmp_path: Path):
    folder = tiny_pipeline("wan", tmp_path / "wan")
    recipe = recipe_for(folder, frames=5, guidance=1.0)
    plan = prepare(recipe).plan
    assert plan.family == "structural"
    assert {len(shared.layers) for shared in plan.inputs if shared.name.endswith("attn1.to_q")} == {3}
    calibrate(recipe, tmp_path / "calib", options=CPU)
    stats = open_calibration(tmp_path / "calib").stats("blocks.0.attn1.to_q")
    tokens = 3 * 8 * 8  # 5 frames are 3 in time's latents; 32 pixels, 4 a token
    assert stats.tokens_seen == 2 * 2 * tokens
    assert torch.isfinite(stats.rows).all()
    report = convert(recipe, tmp_path / "out", calibration=tmp_path / "calib", options=CPU)
    assert report.status == "ok"
    assert any("no family file for WanTransformer3DModel" in warning for warning in report.warnings)


def test_a_pipeline_shows_what_a_made_up_call_can_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where no arguments can be put together, the pipeline's own show which layers share an input."""
    folder = tiny_pipeline("qwen-image", tmp_path / "qwen-image")
    recipe = recipe_for(folder)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"family": "structural"})})
    monkeypatch.setattr("svdq_cli.planning.trace_inputs.watch", lambda model: None)
    plan = prepare(recipe).plan
    groups = {shared.layers for shared in plan.inputs if len(shared.layers) > 1}
    assert tuple(f"transformer_blocks.0.attn.to_{name}" for name in "qkv") in groups
    assert {layer.name for layer in plan.w4a16} == {
        "transformer_blocks.0.img_mod.1",
        "transformer_blocks.0.txt_mod.1",
    }
