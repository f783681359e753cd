"""The main job on a tiny real pipeline: what comes out is whole, checked, repeatable, and runs."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint import writer
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.checkpoint.writer import WEIGHT_FILE
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.entrypoints.generate import generate
from svdq_cli.entrypoints.inspect import inspect_checkpoint, inspect_source
from svdq_cli.errors import CheckFailedError, InputError, OutOfResourcesError, UsageError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.runtime.linear import W4A4Linear, W4A16Linear
from svdq_cli.source import open_source, source_digest
from svdq_cli.storage import atomic
from svdq_cli.storage.tensor_file import TensorWriter
from svdq_cli.system.threads import torch_threads
from tools.generate_flux import generate_flux

WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")
CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\na small green star\nnothing at all\n")
    return path


def recipe_for(source: Path, prompts: Path | None = None, precision: str = "int4") -> Recipe:
    calibration = None
    if prompts is not None:
        calibration = Calibration(
            prompts=str(prompts), samples=3, steps=2, height=32, width=32, max_sequence_length=16, rows=256
        )
    quantization = Quantization.model_validate(
        {"precision": precision, "rank": 16, "smoothing": "closed-form"}
    )
    if calibration is None:
        quantization = Quantization.model_validate({"precision": precision, "rank": 16, "effort": "datafree"})
    return default_recipe(str(source), calibration=calibration, quantization=quantization)


@pytest.fixture(scope="module")
def artefact(tiny_flux: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calib"
    calibrate(recipe_for(tiny_flux, prompts), path, options=CPU)
    return path


@pytest.fixture(scope="module")
def converted(
    tiny_flux: Path, prompts: Path, artefact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("converted") / "int4"
    convert(recipe_for(tiny_flux, prompts), path, calibration=artefact, options=CPU)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_one_calibration_serves_both_precisions_without_running_the_model(
    tiny_flux: Path,
    prompts: Path,
    artefact: Path,
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("svdq_cli.calibration.collect.collect_stats", never)
    report = convert(
        recipe_for(tiny_flux, prompts, precision), tmp_path / "out", calibration=artefact, options=CPU
    )
    assert report.status == "ok"
    assert not report.data_free
    assert report.precision == precision
    assert report.layers.w4a4 == 17
    assert report.layer_sqnr_db.min > 12  # a layer whose layout or smoothing is wrong is below 3 dB
    assert report.bytes.ratio > 1.5


def test_converting_twice_gives_the_same_bytes(
    tiny_flux: Path, prompts: Path, converted: Path, tmp_path: Path
):
    report = convert(recipe_for(tiny_flux, prompts), tmp_path / "again", options=CPU)  # calibrates by itself
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (converted / WEIGHTS).read_bytes()
    assert (tmp_path / "again/transformer/config.json").read_bytes() == (
        converted / "transformer/config.json"
    ).read_bytes()
    assert json.loads((converted / "svdq_report.json").read_text())["fingerprint"] == report.fingerprint


def test_an_artefact_has_the_digest_that_a_conversion_records(converted: Path, artefact: Path):
    provenance = open_checkpoint(converted).provenance
    assert provenance is not None
    assert provenance["calibration_sha256"] == open_calibration(artefact).digest


def test_a_bare_model_is_converted_data_free_and_says_so(tiny_flux: Path, tmp_path: Path):
    report = convert(default_recipe(str(tiny_flux)), tmp_path / "out", options=CPU)
    assert report.data_free
    assert report.effort == "datafree"
    assert any("data-free" in warning for warning in report.warnings)


def test_the_output_is_a_complete_pipeline_that_generates(tiny_flux: Path, converted: Path):
    assert leftovers(converted) == sorted([*leftovers(tiny_flux), "README.md", "svdq_report.json"])
    pipe = load_pipeline(converted, device="cpu", backend="reference")
    transformer = pipe.transformer
    assert isinstance(transformer.transformer_blocks[0].attn.to_q, W4A4Linear)
    assert isinstance(transformer.transformer_blocks[0].norm1.linear, W4A16Linear)
    assert pipe.svdq_backend.name == "reference"
    settings = sampling_for(
        evaluation_recipe(open_checkpoint(converted), str(converted)), open_source(tiny_flux)
    ).settings
    (image,) = generate_images(pipe, ["a red circle"], settings=settings)
    assert image.size == (32, 32)


def test_generate_writes_one_image(converted: Path, tmp_path: Path):
    recipe = evaluation_recipe(open_checkpoint(converted), str(converted))
    report = generate(converted, "a red circle", tmp_path / "one.png", recipe=recipe, options=CPU)
    assert (report.width, report.height) == (32, 32)
    assert leftovers(tmp_path) == ["one.png"]
    with pytest.raises(UsageError, match="unknown image type"):
        generate(converted, "a red circle", tmp_path / "one.txt", recipe=recipe, options=CPU)


def test_inspect_and_plan_predict_what_convert_writes(tiny_flux: Path, prompts: Path, converted: Path):
    planned = inspect_source(recipe_for(tiny_flux, prompts))
    made = inspect_checkpoint(converted)
    assert planned.bytes == predict(recipe_for(tiny_flux, prompts)).bytes
    # what is predicted are tensors; what is written are files, whose headers hold provenance
    (file,) = (converted / "transformer").glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert made.bytes.input == planned.bytes.input
    assert made.bytes.output == planned.bytes.output + header == file.stat().st_size
    assert {(layer.name, layer.role, layer.rank) for layer in planned.layers} == {
        (layer.name, layer.role, layer.rank) for layer in made.layers
    }
    assert made.provenance is not None
    assert made.provenance["source_sha256"] == source_digest(open_source(tiny_flux))


def test_inspect_says_the_bytes_that_the_conversion_said(tiny_flux: Path, tmp_path: Path):
    report = convert(recipe_for(tiny_flux / "transformer"), tmp_path / "out", options=CPU)
    assert inspect_checkpoint(tmp_path / "out").bytes == report.bytes


def test_a_lone_component_converts_data_free_to_a_component_folder(tiny_flux: Path, tmp_path: Path):
    recipe = recipe_for(tiny_flux / "transformer")
    report = convert(recipe, tmp_path / "out", options=CPU)
    assert (tmp_path / "out/config.json").is_file()
    assert check(tmp_path / "out", against=open_source(tiny_flux)).status == "ok"
    assert report.outputs[0].path == str(tmp_path / "out")


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_nan_weight_names_file_and_layer_and_leaves_nothing(tiny_flux_copy: Path, tmp_path: Path):
    weights = load_file(tiny_flux_copy / WEIGHTS)
    weights["transformer_blocks.0.ff.net.2.weight"][3, 5] = float("nan")
    save_file(weights, tiny_flux_copy / WEIGHTS)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.ff\.net\.2\.weight holds NaN") as caught:
        convert(recipe_for(tiny_flux_copy), tmp_path / "outputs/out", options=CPU)
    assert str(tiny_flux_copy / WEIGHTS) in caught.value.message
    assert leftovers(tmp_path / "outputs") == []


def test_a_nan_in_a_kept_tensor_is_found_too(tiny_flux_copy: Path, tmp_path: Path):
    weights = load_file(tiny_flux_copy / WEIGHTS)
    weights["x_embedder.bias"][0] = float("inf")
    save_file(weights, tiny_flux_copy / WEIGHTS)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(InputError, match=r"x_embedder\.bias"):
        convert(recipe_for(tiny_flux_copy), tmp_path / "outputs/out", options=CPU)
    assert leftovers(tmp_path / "outputs") == []


def test_a_calibration_of_other_weights_is_refused(
    tiny_flux_copy: Path, artefact: Path, prompts: Path, tmp_path: Path
):
    weights = load_file(tiny_flux_copy / WEIGHTS)
    weights["proj_out.bias"] += 1
    save_file(weights, tiny_flux_copy / WEIGHTS)
    with pytest.raises(InputError, match="made with different weights"):
        convert(recipe_for(tiny_flux_copy, prompts), tmp_path / "out", calibration=artefact, options=CPU)


def test_an_output_that_exists_is_kept_unless_overwritten(tiny_flux: Path, tmp_path: Path):
    out = tmp_path / "out"
    convert(recipe_for(tiny_flux), out, options=CPU)
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="already exists") as caught:
        convert(recipe_for(tiny_flux), out, options=CPU)
    assert "--overwrite" in str(caught.value.hint)
    assert (out / "mine.txt").is_file()
    convert(recipe_for(tiny_flux), out, options=RunOptions(device="cpu", overwrite=True))
    assert not (out / "mine.txt").exists()
    assert leftovers(tmp_path) == ["out"]


def test_too_small_a_disk_is_refused_before_the_work(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Usage:
        free = 1000

    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OutOfResourcesError, match=r"the disk has 0\.0 MB left"):
        convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU)
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_while_writing_leaves_only_the_solved_layers(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_tensors", full)
    with pytest.raises(OutOfResourcesError, match="the disk is full") as caught:
        convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU)
    assert leftovers(tmp_path) == [".out.work"]
    assert caught.value.resumable
    assert "--resume" in str(caught.value.hint)


def test_a_checkpoint_that_fails_its_check_never_gets_its_name(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = TensorWriter.write

    def scrambled(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, name, tensor.flip(0) if name == "transformer_blocks.0.attn.to_q.qweight" else tensor)

    monkeypatch.setattr(TensorWriter, "write", scrambled)
    with pytest.raises(CheckFailedError, match=r"transformer_blocks\.0\.attn\.to_q"):
        convert(recipe_for(tiny_flux), tmp_path / "out", options=CPU)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("proj_out.weight"), "is missing"),
        (lambda t: t.pop("transformer_blocks.0.attn.to_q.wscales"), "is missing"),
        (lambda t: t.update(stranger=torch.zeros(1)), "does not belong"),
        (lambda t: t["transformer_blocks.0.attn.to_q.wscales"].fill_(float("nan")), "not finite"),
        (lambda t: t["x_embedder.weight"].fill_(float("inf")), "infinite"),
    ],
    ids=["kept-missing", "packed-missing", "foreign", "nan-scale", "inf-kept"],
)
def test_check_names_what_is_wrong(converted: Path, tmp_path: Path, damage, said: str):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    tensors = load_file(copy / WEIGHTS)
    damage(tensors)
    save_file(tensors, copy / WEIGHTS)
    report = check(copy)
    assert report.status == "failed"
    assert said in report.problems[0].what


def test_check_against_another_model_fails_on_its_layers(converted: Path, tmp_path: Path):
    from tests.tiny import tiny_flux_pipeline

    other = tiny_flux_pipeline(tmp_path / "other", seed=7)
    report = check(converted, against=open_source(other))
    assert report.status == "failed"
    assert {problem.layer for problem in report.problems} == set(report.layer_error or {})


def test_the_number_of_cores_does_not_change_a_data_free_output(tmp_path: Path):
    # wide enough for sums to be shared by threads
    generate_flux(tmp_path / "model", double=1, single=1, heads=1)
    recipe = default_recipe(str(tmp_path / "model"), quantization=Quantization(effort="datafree", rank=16))
    written: list[bytes] = []
    for count in (1, 3):
        with torch_threads(count):
            convert(recipe, tmp_path / str(count), options=CPU)
        written.append((tmp_path / str(count) / WEIGHT_FILE).read_bytes())
    assert written[0] == written[1]
