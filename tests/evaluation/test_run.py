"""An evaluation: what it measures, what it keeps, and how it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import typer
from PIL import Image

import svdq_cli.evaluation.passes
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli.render import exit_with
from svdq_cli.errors import CanceledRunError, EnvironmentLacksError, SvdqError, UsageError
from svdq_cli.evaluation.passes import passes_of_text
from svdq_cli.evaluation.plan import plan_evaluation
from svdq_cli.evaluation.run import evaluate
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Recipe, parse_fail_if
from svdq_cli.records import Event
from svdq_cli.reports import EvalReport, to_json

CPU = RunOptions(device="cpu")
PROMPTS = "a red <b>circle</b>\na blue <b>square</b>\na small green <b>star</b>\n"


@pytest.fixture
def checkpoint(converted_flux: Callable[[str], Path]) -> Path:
    return converted_flux("int4") / "lite"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture
def recipe(checkpoint: Path, tiny_flux: Path, prompts: Path) -> Recipe:
    return with_samples(evaluation_recipe(open_checkpoint(checkpoint), str(tiny_flux)), 2, prompts)


def with_samples(recipe: Recipe, samples: int, prompts: Path) -> Recipe:
    assert recipe.calibration is not None
    update = {"prompts": str(prompts), "samples": samples, "steps": 2, "height": 32, "width": 32}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=update)})


def figures(report: EvalReport) -> dict[str, object]:
    """What must not depend on how often a run was stopped."""
    plain = to_json(report)
    del plain["seconds"]
    return plain


def test_an_evaluation_scores_the_checkpoint_and_its_baseline_and_goes_on_where_it_stood(
    checkpoint: Path, recipe: Recipe, tmp_path: Path
):
    folder = tmp_path / "report"
    report = evaluate(checkpoint, recipe, report_folder=folder, options=CPU)
    assert report.images == 2
    assert 15 < report.psnr_db.mean < 100
    assert report.psnr_db.ci95 is not None
    assert report.psnr_db.ci95[0] <= report.psnr_db.mean <= report.psnr_db.ci95[1]
    assert report.noise_floor_psnr_db is not None
    assert report.noise_floor_psnr_db > report.psnr_db.mean
    assert len(report.layer_sqnr_db.per_layer) == 20
    assert report.own_noise_psnr_db is not None
    assert report.psnr_db.mean < report.own_noise_psnr_db
    assert report.output_sqnr_db is not None
    assert 3 < report.output_sqnr_db.step < report.output_sqnr_db.sum < 60
    page = unescape((folder / "report.html").read_text())
    assert report.verdict in page
    assert report.next
    assert report.figures["clip"] is None
    assert "hf download" in report.missing["clip"]
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(to_json(report)))
    page = (folder / "report.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 4

    def drawn(options: RunOptions) -> tuple[EvalReport, set[str]]:
        events: list[Event] = []
        again = evaluate(checkpoint, recipe, report_folder=folder, options=options, observe=events.append)
        return again, {
            event.stage for event in events if event.stage.startswith(("generate", "layer", "model"))
        }

    again, stages = drawn(CPU)
    assert stages == set()
    assert figures(again) == figures(report)
    before = (folder / "converted" / "0001.png").read_bytes()
    (folder / "converted" / "0001.png").unlink()
    again, stages = drawn(CPU)
    assert stages == {"generate SVDQuant"}
    assert (folder / "converted" / "0001.png").read_bytes() == before
    assert again.psnr_db == report.psnr_db
    _, stages = drawn(replace(CPU, overwrite=True))
    assert {"generate 16-bit", "generate naive 4-bit", "generate SVDQuant"} <= stages


def test_the_4_bit_layers_run_on_the_backend_that_is_asked_for_and_the_report_says_so(
    checkpoint: Path, recipe: Recipe, tmp_path: Path
):
    without = passes_of_text(["naive,floor,own-noise,outputs,nf4"])
    folder = tmp_path / "report"
    report = evaluate(
        checkpoint, recipe, report_folder=folder, without=without, backend="reference", options=CPU
    )
    assert report.backend == "reference: plain torch on cpu, as asked"
    assert "Backend: reference (plain torch on cpu, as asked)" in unescape(
        (folder / "report.html").read_text()
    )
    # before anything is sampled, and by the plan too
    for run in (evaluate, plan_evaluation):
        with pytest.raises(EnvironmentLacksError, match="GPU"):
            run(checkpoint, recipe, without=without, backend="kernels", options=CPU)
        with pytest.raises(UsageError, match="unknown backend 'gpu'"):
            run(checkpoint, recipe, without=without, backend="gpu", options=CPU)


def test_passes_can_be_left_out_and_made_later(checkpoint: Path, recipe: Recipe, tmp_path: Path):
    folder = tmp_path / "report"
    events: list[Event] = []
    without = passes_of_text(["naive,floor", "own-noise,outputs,nf4"])
    report = evaluate(
        checkpoint, recipe, report_folder=folder, without=without, options=CPU, observe=events.append
    )
    assert {event.stage for event in events if event.stage.startswith(("generate", "model"))} == {
        "generate 16-bit",
        "generate SVDQuant",
    }
    assert (report.noise_floor_psnr_db, report.own_noise_psnr_db, report.output_sqnr_db) == (None, None, None)
    assert report.baselines == {}
    assert report.missing["noise_floor_psnr_db"] == "skipped by --without floor"
    assert "not compared with naive" in report.verdict
    whole = evaluate(checkpoint, recipe, report_folder=folder, options=CPU)
    assert whole.baselines["rtn"].summary("psnr_db").mean > 0
    assert whole.psnr_db.mean == report.psnr_db.mean
    with pytest.raises(UsageError, match="--without converted"):
        passes_of_text(["converted"])


def test_a_plan_names_the_passes_that_a_run_makes(checkpoint: Path, recipe: Recipe, tmp_path: Path):
    """And counts what is there as made."""
    folder = tmp_path / "report"
    events: list[Event] = []
    plan = plan_evaluation(checkpoint, recipe, report_folder=folder, without=["floor"], options=CPU)
    assert not folder.exists()
    evaluate(checkpoint, recipe, report_folder=folder, without=["floor"], options=CPU, observe=events.append)
    made = {
        event.stage.removeprefix("generate ")
        for event in events
        if event.stage.startswith(("generate", "layer", "model"))
    }
    assert {each.title for each in plan.passes} == made
    assert {each.images for each in plan.passes} == {2}
    assert {each.calls for each in plan.passes} == {4}
    assert plan.seconds is not None
    assert 0 < plan.seconds[0] < plan.seconds[1]
    assert plan.missing["floor"] == "skipped by --without floor"
    again = plan_evaluation(checkpoint, recipe, report_folder=folder, without=["floor"], options=CPU)
    assert {each.images for each in again.passes if each.title.startswith(("16", "SVDQuant"))} == {0}


def test_figures_of_empty_images_are_no_good_news(
    checkpoint: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Said at once, in the report and on the page; a gate that they would meet is missed."""
    keep = svdq_cli.evaluation.passes.keep_image
    blank = Image.new("RGB", (32, 32), (243, 242, 244))
    monkeypatch.setattr(
        svdq_cli.evaluation.passes,
        "keep_image",
        lambda image_store, way, i, image: keep(image_store, way, i, blank),
    )
    events: list[Event] = []
    gated = recipe.model_copy(update={"gates": (parse_fail_if("psnr_db<20"),)})
    folder = tmp_path / "report"
    report = evaluate(checkpoint, gated, report_folder=folder, options=CPU, observe=events.append)
    said = "2 of 2 16-bit images are nearly one color"
    stages = [event.stage for event in events]
    warned = next(i for i, event in enumerate(events) if event.kind == "warning" and event.detail == said)
    assert warned < stages.index("generate naive 4-bit")
    assert report.sixteen_bit_images.meaningless
    assert report.verdict.startswith(f"No verdict: {said}")
    assert said in report.warnings
    assert report.status == "gate-missed"
    assert "is meaningless" in report.gates_missed[0]
    assert said in (folder / "report.html").read_text()
    with pytest.raises(typer.Exit) as left:
        exit_with(report)
    assert left.value.exit_code == 6
    assert "kept" not in capsys.readouterr().err, "an evaluation has no outputs"


def test_more_samples_generate_only_the_new_ones_and_other_settings_are_refused(
    checkpoint: Path, recipe: Recipe, prompts: Path, tmp_path: Path
):
    folder = tmp_path / "report"
    evaluate(checkpoint, recipe, report_folder=folder, options=CPU)
    first = (folder / "16bit" / "0000.png").stat().st_mtime_ns
    steps = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"steps": 3})})  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r'settings .*"steps": 2.*"steps": 3'):
        evaluate(checkpoint, steps, report_folder=folder, options=CPU)
    assert (folder / "16bit" / "0000.png").stat().st_mtime_ns == first


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_report_folder_that_holds_something_else_is_refused_at_once(
    checkpoint: Path, recipe: Recipe, tmp_path: Path, overwrite: bool
):
    (tmp_path / "precious.txt").write_text("mine")
    events: list[Event] = []
    options = replace(CPU, overwrite=overwrite)
    with pytest.raises(UsageError, match="not written by svdq eval"):
        evaluate(checkpoint, recipe, report_folder=tmp_path, options=options, observe=events.append)
    assert events == []
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_gate_on_a_figure_of_another_command_is_not_missed(checkpoint: Path, recipe: Recipe):
    gates = tuple(map(parse_fail_if, ("ssim<0.1", "size_ratio<50")))
    report = evaluate(checkpoint, recipe.model_copy(update={"gates": gates}), options=CPU)
    assert (report.status, report.gates_missed) == ("ok", ())


@pytest.mark.parametrize(
    ("condition", "error", "message", "cure"),
    [
        ("fid>50", UsageError, "FID of 2 images is meaningless", "--samples"),
        ("image_reward.min<0", EnvironmentLacksError, "needs the package ImageReward", "pip install"),
        ("temporal_psnr_db<20", UsageError, "these are images", "psnr_db"),
        ("audio_snr_db<20", UsageError, "these are images", "psnr_db"),
        ("output_sqnr_db.step<9", UsageError, "without the pass 'outputs'", "leave out --without outputs"),
    ],
)
def test_a_gate_that_can_not_be_measured_is_refused_before_the_work(
    condition: str,
    error: type[SvdqError],
    message: str,
    cure: str,
    checkpoint: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "ImageReward", None)  # as where it is not installed
    gated = recipe.model_copy(update={"gates": (parse_fail_if(condition),)})
    for run in (evaluate, plan_evaluation):
        with pytest.raises(error, match=message) as caught:
            run(checkpoint, gated, report_folder=tmp_path / "report", without=["outputs"], options=CPU)
        assert cure in str(caught.value.hint)
    assert not (tmp_path / "report").exists(), "nothing was sampled"


def test_an_evaluation_without_a_folder_leaves_nothing_behind(
    checkpoint: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = evaluate(checkpoint, recipe, options=CPU)
    assert report.page is None
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_run_that_was_cut_off_are_whole(checkpoint: Path, recipe: Recipe, tmp_path: Path):
    """A run that stops between two pictures leaves only whole ones."""

    def stop(event: Event) -> None:
        if event.stage == "generate naive 4-bit" and event.kind == "advance":
            raise KeyboardInterrupt

    folder = tmp_path / "report"
    with pytest.raises(CanceledRunError) as caught:
        evaluate(checkpoint, recipe, report_folder=folder, options=CPU, observe=stop)
    assert caught.value.resumable
    assert f"{folder} keeps the images" in (caught.value.hint or "")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert found[:2] == ["16bit-again/0000.png", "16bit-again/0001.png"]
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    assert evaluate(checkpoint, recipe, report_folder=folder, options=CPU).images == 2
