"""Ranks and 16-bit layers by byte budget, and effort `best`, through a whole conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.conversion.provenance import contents_before
from svdq_cli.conversion.size_budget import most_bytes
from svdq_cli.errors import UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Calibration, Output, Quantization, RankOverride, Recipe, default_recipe
from svdq_cli.reconstruct import tuning
from svdq_cli.reports import ConvertReport
from svdq_cli.source import open_source

CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\na small green star\nnothing at all\n")
    return path


def recipe_for(
    source: Path, prompts: Path | None, fmt: str = "nunchaku-lite", **quantization: object
) -> Recipe:
    calibration = prompts and Calibration(
        prompts=str(prompts), samples=4, steps=2, height=32, width=32, max_sequence_length=16, rows=256
    )
    wanted = {"smoothing": "closed-form", "effort": "fast", **quantization}
    return default_recipe(
        str(source),
        calibration=calibration,
        quantization=Quantization.model_validate(wanted),
        outputs=[Output.model_validate({"format": fmt, "path": "unused"})],
    )


@pytest.fixture(scope="module")
def artefact(tiny_flux: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calib"
    calibrate(recipe_for(tiny_flux, prompts), path, options=CPU)
    return path


@pytest.fixture(scope="module")
def rank_32(tiny_flux: Path, artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertReport:
    out = tmp_path_factory.mktemp("rank_32") / "out"
    return convert(recipe_for(tiny_flux, None, rank=32), out, calibration=artefact, options=CPU)


def test_rank_auto_gives_every_layer_its_own_within_the_bytes_of_rank_32(
    tiny_flux: Path, artefact: Path, tmp_path: Path
):
    sizes: dict[object, int] = {}
    for rank in (32, "auto"):
        out = tmp_path / f"{rank}.safetensors"
        report = convert(
            recipe_for(tiny_flux, None, "comfy", rank=rank), out, calibration=artefact, options=CPU
        )
        sizes[rank] = report.bytes.output
        assert check(out).status == "ok"
    assert report.rank.requested == "auto"
    assert 16 <= report.rank.min < report.rank.max <= 128
    assert sizes["auto"] <= sizes[32] + 4096  # the header names the ranks
    assert any("as if every layer mattered equally" in warning for warning in report.warnings)


def test_with_prompts_ranks_go_by_what_reaches_the_output(
    tiny_flux: Path, prompts: Path, artefact: Path, tmp_path: Path
):
    out = tmp_path / "out.safetensors"
    recipe = recipe_for(tiny_flux, prompts, "comfy", rank="auto")
    report = convert(recipe, out, calibration=artefact, options=CPU)
    assert report.rank.min < report.rank.max
    assert not any("as if every layer" in warning for warning in report.warnings)


def test_a_format_with_one_rank_says_what_that_costs(
    tiny_flux: Path, artefact: Path, rank_32: ConvertReport, tmp_path: Path
):
    recipe = recipe_for(tiny_flux, None, rank="auto")
    report = convert(recipe, tmp_path / "out", calibration=artefact, options=CPU)
    assert report.rank.min == report.rank.max
    assert report.bytes.output <= rank_32.bytes.output + 4096  # the header embeds the recipe
    assert any("for all layers" in warning and "less error" in warning for warning in report.warnings)


def test_a_size_budget_keeps_the_layers_that_lose_most_at_16_bit(
    tiny_flux: Path, artefact: Path, rank_32: ConvertReport, tmp_path: Path
):
    budget = rank_32.bytes.output + (rank_32.bytes.input - rank_32.bytes.output) // 4
    recipe = recipe_for(tiny_flux, None, rank=32, size_budget=budget)
    report = convert(recipe, tmp_path / "out", calibration=artefact, options=CPU)
    assert rank_32.bytes.output < report.bytes.output <= budget
    assert report.layers.kept > rank_32.layers.kept
    assert report.layers.kept + report.layers.w4a4 + report.layers.w4a16 == sum(
        (rank_32.layers.kept, rank_32.layers.w4a4, rank_32.layers.w4a16)
    )
    assert check(tmp_path / "out").status == "ok"


def test_a_size_budget_below_the_smallest_size_names_that(tiny_flux: Path, artefact: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"the smallest possible for this model is [\d,]+ bytes"):
        convert(
            recipe_for(tiny_flux, None, size_budget="10kB"),
            tmp_path / "out",
            calibration=artefact,
            options=CPU,
        )


def test_a_budget_that_cannot_be_met_is_refused_before_the_calibration_and_by_the_plan(
    tiny_flux: Path, prompts: Path, tmp_path: Path
):
    recipe = recipe_for(tiny_flux, prompts, rank="auto", size_budget="10kB")
    for refused in (
        lambda: convert(recipe, tmp_path / "out", options=CPU),
        lambda: predict(recipe, options=CPU),
    ):
        with pytest.raises(UsageError, match="too small") as refusal:
            refused()
        assert refusal.value.hint == "raise size_budget"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "formats", [("nunchaku-lite",), ("comfy",), ("comfy-core",), ("comfy", "nunchaku-lite")]
)
def test_no_output_is_larger_than_the_budget_that_the_plan_calls_enough(
    tiny_flux: Path, artefact: Path, tmp_path: Path, formats: tuple[str, ...]
):
    """Headers included, at the least budget there is and above."""
    outputs = tuple(Output(format=name) for name in formats)
    paths = tuple(tmp_path / (name if name == "nunchaku-lite" else f"{name}.safetensors") for name in formats)

    def recipe(budget: int) -> Recipe:
        made = recipe_for(tiny_flux, Path("unread"), rank="auto", size_budget=budget)
        return made.model_copy(update={"outputs": outputs, "calibration": None})

    plan = predict(recipe(10**8), calibration=artefact, options=CPU)
    assert plan.size_budget is not None
    assert plan.size_budget.left == 10**8 - plan.size_budget.least
    for more in (0, 1, 3000, 50_000):
        budget = plan.size_budget.least + more
        options = RunOptions(device="cpu", overwrite=True)
        report = convert(recipe(budget), paths, calibration=artefact, options=options)
        sizes = [output.bytes for output in report.outputs]
        assert max(sizes) <= budget, (more, sizes)
    # what is left over is less than the next better rank of some layer takes
    assert max(sizes) > plan.size_budget.least


def test_the_size_that_a_plan_counts_is_that_of_the_file(tiny_flux: Path, artefact: Path, tmp_path: Path):
    """But for the digits of numbers that are not known yet, and the header's padding."""
    for fmt in ("nunchaku-lite", "nunchaku", "comfy", "comfy-core"):
        recipe = recipe_for(tiny_flux, None, fmt)
        counted = most_bytes(prepare(recipe), contents_before(prepare(recipe), CPU))
        path = tmp_path / (fmt if fmt == "nunchaku-lite" else f"{fmt}.safetensors")
        written = convert(recipe, path, calibration=artefact, options=CPU).outputs[0].bytes
        assert written <= counted
        assert counted - written < 1500, fmt  # curves among them, of which this model has none


def test_a_rank_that_the_recipe_gives_a_layer_is_kept_by_the_search(
    tiny_flux: Path, artefact: Path, tmp_path: Path
):
    recipe = recipe_for(tiny_flux, None, "comfy", rank="auto")
    override = RankOverride(match="transformer_blocks.0.ff.net.2", rank=48)
    recipe = recipe.model_copy(update={"layers": (override,)})
    report = convert(recipe, tmp_path / "out.safetensors", calibration=artefact, options=CPU)
    assert report.search.layers["transformer_blocks.0.ff.net.2"].rank == 48
    assert report.rank.min < report.rank.max


def test_a_format_that_cannot_mix_refuses_a_size_budget(tiny_flux: Path, artefact: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="format 'nunchaku' can't store them"):
        convert(
            recipe_for(tiny_flux, None, "nunchaku", rank=32, size_budget="1GB"),
            tmp_path / "out.safetensors",
            calibration=artefact,
            options=CPU,
        )


def test_ranks_are_not_searched_without_activations(tiny_flux: Path, tmp_path: Path):
    recipe = recipe_for(tiny_flux, None, effort="datafree", smoothing=None, rank="auto")
    with pytest.raises(UsageError, match="there is no calibration"):
        convert(recipe, tmp_path / "out", options=CPU)


def test_best_tunes_the_model(
    tiny_flux: Path, prompts: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # more than the steps in which the learning rate grows
    monkeypatch.setattr(tuning, "STEPS", 40)
    monkeypatch.setattr(tuning, "JUDGE_EVERY", 20)
    recipe = recipe_for(tiny_flux, prompts, effort="best", rank=16)
    report = convert(recipe, tmp_path / "out", calibration=artefact, options=CPU)
    (search,) = report.search.tuning.values()
    assert list(report.search.tuning) == ["transformer"]
    assert 0 < search.after < search.before
    steps = report.search.layers["transformer_blocks.0.ff.net.2"].steps_db
    assert list(steps) == ["start", "learned", "refine", "gptq", "refit"]
    assert open_checkpoint(tmp_path / "out").rank == 16


def test_the_last_linear_is_fitted_and_stored_where_held_out_images_gain(
    tiny_flux: Path, prompts: Path, artefact: Path, tmp_path: Path
):
    def converted(*search: str) -> tuple[ConvertReport, Checkpoint]:
        recipe = recipe_for(tiny_flux, prompts, effort="balanced", rank=16, search=search)
        out = tmp_path / "-".join(search)
        return convert(recipe, out, calibration=artefact, options=CPU), open_checkpoint(out)

    (report, fitted), (plain, as_it_was) = converted("gptq", "output"), converted("gptq")
    assert plain.search.outputs == {}
    assert (as_it_was.provenance or {}).get("fitted") is None
    (search,) = report.search.outputs.values()
    assert list(report.search.outputs) == ["proj_out"]
    assert search.ridge is not None
    assert 0 < search.after < search.before
    assert (fitted.provenance or {})["fitted"] == ["proj_out"]
    changed = [
        name
        for name in fitted.kept_names()
        if not torch.equal(fitted.kept_tensor(name), as_it_was.kept_tensor(name))
    ]
    assert changed == ["proj_out.weight", "proj_out.bias"]
    for plan in fitted.layers:
        assert torch.equal(fitted.solution(plan).codes, as_it_was.solution(plan).codes)
    assert check(tmp_path / "gptq-output", against=open_source(tiny_flux)).status == "ok"


def test_without_the_pipeline_and_prompts_the_last_linear_stays(
    tiny_flux: Path, artefact: Path, tmp_path: Path
):
    recipe = recipe_for(tiny_flux, None, effort="balanced", rank=16, search=("output",))
    assert convert(recipe, tmp_path / "out", calibration=artefact, options=CPU).search.outputs == {}


def test_a_run_with_too_little_memory_for_both_models_says_that_the_last_linear_stays(
    tiny_flux: Path, prompts: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("svdq_cli.conversion.predict._blocks_fit", lambda *_: False)
    recipe = recipe_for(tiny_flux, prompts, effort="balanced", rank=16, search=("output",))
    report = convert(recipe, tmp_path / "out", calibration=artefact, options=CPU)
    assert report.search.outputs == {}
    assert any("the last linear layer is not fitted" in warning for warning in report.warnings)


def test_best_without_prompts_says_so_before_the_long_work(
    tiny_flux: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*args: object) -> None:
        raise AssertionError("layers were solved")

    monkeypatch.setattr("svdq_cli.conversion.convert.solve_into", never)
    with pytest.raises(UsageError, match="needs the whole pipeline and prompts"):
        convert(
            recipe_for(tiny_flux, None, effort="best"), tmp_path / "out", calibration=artefact, options=CPU
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "meant"),
    [(5, 5), ("6.5GB", 6_500_000_000), ("2 GiB", 2**31), ("100k", 100_000), ("7", 7), (None, None)],
)
def test_a_size_is_bytes_or_a_number_with_its_unit(said: object, meant: int | None):
    assert Quantization.model_validate({"size_budget": said}).size_bytes == meant


@pytest.mark.parametrize("said", [0, -1, True, 1.5, "many", "-2GB", "6.5 GB of RAM"])
def test_what_is_no_size_is_refused(said: object):
    with pytest.raises(ValidationError, match="must be a number of bytes"):
        Quantization.model_validate({"size_budget": said})
