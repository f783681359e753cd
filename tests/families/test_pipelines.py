"""Every family on a tiny pipeline of its own: planned, calibrated, converted, checked, loaded, and it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear
from svdq_cli.runtime.linear import W4A4Linear
from svdq_cli.source import open_source
from tests.tiny_families import PLANNED, tiny_pipeline

CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module", params=PLANNED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(family, tmp_path_factory.mktemp("tiny") / family)


@pytest.fixture(scope="module")
def artefact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One calibration serves both precisions. It also compares what layers with a shared input read."""
    path = tmp_path_factory.mktemp("calibration") / "calib"
    calibrate(recipe_for(folder), path, options=CPU)
    return path


def recipe_for(folder: Path, precision: str = "int4") -> Recipe:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    return default_recipe(
        str(folder),
        calibration=Calibration(
            prompts=str(prompts), samples=2, steps=2, height=32, width=32, max_sequence_length=16, rows=128
        ),
        quantization=Quantization.model_validate(
            {"precision": precision, "rank": 16, "smoothing": "closed-form"}
        ),
    )


def test_every_linear_has_the_role_that_the_family_gives_it(family: str, folder: Path):
    prepared = prepare(recipe_for(folder))
    assert prepared.plan.family == family
    plan = prepared.plan
    assert (len(plan.w4a4), len(plan.w4a16), len(plan.kept)) == PLANNED[family]


def test_layers_planned_to_share_an_input_read_the_same_tensor(family: str, folder: Path):
    """Seen by hooks of this test's own, in one denoising step; every quantized layer is run."""
    prepared = prepare(recipe_for(folder))
    pipe = load_source_pipeline(folder, dtype=torch.float32)
    model = getattr(pipe, prepared.source.component)
    read: dict[str, list[torch.Tensor]] = {}
    for layer in prepared.plan.layers:

        def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = layer.name) -> None:
            read.setdefault(name, []).append(args[0].clone())

        model.get_submodule(layer.name).register_forward_pre_hook(note)
    settings = sampling_for(prepared.recipe, prepared.source).settings
    generate_images(pipe, ["a red circle"], settings=settings)
    assert set(read) == {layer.name for layer in prepared.plan.layers}
    for shared in prepared.plan.inputs:
        first = read[shared.layers[0]]
        for name in shared.layers[1:]:
            assert len(read[name]) == len(first)
            assert all(torch.equal(a, b) for a, b in zip(first, read[name], strict=True)), (shared.name, name)
    separate = [read[shared.layers[0]][0] for shared in prepared.plan.inputs if shared.layers[0] in read]
    w4a4 = {layer.name for layer in prepared.plan.w4a4}
    lone = [x for shared, x in zip(prepared.plan.inputs, separate, strict=True) if shared.layers[0] in w4a4]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(lone) for b in lone[:i]), (
        "two inputs of W4A4 layers are one: the family could share them"
    )


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_calibrated_conversion_is_sound_and_generates(
    family: str, folder: Path, artefact: Path, tmp_path: Path, precision: str
):
    out = tmp_path / "out"
    report = convert(recipe_for(folder, precision), out, calibration=artefact, options=CPU)
    assert report.status == "ok"
    assert report.layer_sqnr_db.min > 10  # a layer whose layout or smoothing is wrong is below 3 dB
    assert check(out, against=open_source(folder)).status == "ok"
    pipe = load_pipeline(out, device="cpu")
    checkpoint = open_checkpoint(out)
    assert checkpoint.family == family
    model = getattr(pipe, checkpoint.source.component)
    assert isinstance(model.get_submodule(report_first(out)), CpuW4A4Linear | W4A4Linear)
    settings = sampling_for(evaluation_recipe(checkpoint, str(out)), checkpoint.source).settings
    (image,) = generate_images(pipe, ["a red circle"], settings=settings)
    assert image.size == (32, 32)
    assert len(image.getcolors(maxcolors=32 * 32) or ()) > 1  # not one flat color


def report_first(path: Path) -> str:
    return open_checkpoint(path).layers[0].name


def test_statistics_are_kept_of_every_input(folder: Path, artefact: Path):
    """Of those that this format keeps at 16 bits, too: one calibration serves every format."""
    calibration = open_calibration(artefact)
    prepared = prepare(recipe_for(folder))
    assert {shared.name for shared in prepared.plan.inputs} <= set(calibration.names)
    widths = {linear.name: linear.in_features for linear in prepared.inventory.linears}
    for name in calibration.names:
        assert calibration.stats(name).abs_max.shape == (widths[name],)


def test_pixart_under_its_official_class_name(tmp_path: Path):
    """The official pipeline and config say Transformer2DModel; diffusers builds PixArtTransformer2DModel of it."""
    folder = tiny_pipeline("pixart", tmp_path / "pixart")
    for file in (folder / "model_index.json", folder / "transformer/config.json"):
        text = file.read_text()
        assert "PixArtTransformer2DModel" in text
        file.write_text(text.replace("PixArtTransformer2DModel", "Transformer2DModel"))
    report = convert(recipe_for(folder), tmp_path / "out", options=CPU)
    assert report.model.family == "pixart"
    assert report.model.model_class == "PixArtTransformer2DModel"
    assert check(tmp_path / "out", against=open_source(folder)).status == "ok"
    pipe = load_pipeline(tmp_path / "out", device="cpu")
    assert type(pipe.transformer).__name__ == "PixArtTransformer2DModel"
    settings = sampling_for(recipe_for(folder), open_source(folder)).settings
    (image,) = generate_images(pipe, ["a red circle"], settings=settings)
    assert image.size == (32, 32)


def test_qwen_image_s_newer_edit_model_has_two_kinds_of_modulation(tmp_path: Path):
    """Its image stream is modulated by two vectors, its text stream by one: they are separate inputs."""
    folder = tiny_pipeline("qwen-image-edit", tmp_path / "qwen-image-edit")
    calibrate(recipe_for(folder), tmp_path / "calib", options=CPU)
    calibration = open_calibration(tmp_path / "calib")
    image, text = (calibration.stats(f"transformer_blocks.0.{name}_mod.1") for name in ("img", "txt"))
    assert image.tokens_seen == 2 * text.tokens_seen
    report = convert(recipe_for(folder), tmp_path / "out", calibration=tmp_path / "calib", options=CPU)
    assert report.status == "ok"


def test_z_image_that_reads_images_is_planned_by_the_family(tmp_path: Path):
    """Its image tokens have refiners of their own, which are blocks as the others."""
    config = {"_class_name": "ZImageTransformer2DModel", "siglip_feat_dim": 1152, "n_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = prepare(default_recipe(str(tmp_path / "config.json"))).plan
    refined = [layer.name for layer in plan.w4a4 if layer.name.startswith("siglip_refiner.")]
    assert len(refined) == 2 * 7
    assert "siglip_embedder.1" in {linear.name for linear in plan.kept}


def test_a_unet_with_one_linear_for_its_class_is_planned_by_the_family(tmp_path: Path):
    config = {
        "_class_name": "UNet2DConditionModel",
        "cross_attention_dim": 768,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = prepare(default_recipe(str(tmp_path / "config.json"))).plan
    assert plan.family == "sd15"
    assert "class_embedding" in {linear.name for linear in plan.kept}
