"""A benchmark measures what it says: every layer, correct arithmetic, plain notes. Durations are never asserted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from svdq_cli.bench.cases import BenchSettings
from svdq_cli.bench.gates import judged
from svdq_cli.bench.operations import reference_linear, w4a4_float64, w4a16_float64, without_branch
from svdq_cli.bench.report import BenchReport, BenchRow, Microseconds
from svdq_cli.bench.run import bench_layers, bench_shapes, precisions_named, with_steps
from svdq_cli.bench.shapes import DEMO, SHAPE_SETS, LinearShape, ShapeSet
from svdq_cli.bench.timing import LEAST_SAMPLES, MOST_COPIES, copies_beyond_cache, measure
from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.cli import run
from svdq_cli.cli.render import show
from svdq_cli.conversion.convert import convert
from svdq_cli.cpu.build import find_compiler
from svdq_cli.errors import EnvironmentLacksError, InputError, UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.records import RotatedPlan, W4A4Plan, W4A4Solution, W4A16Solution
from svdq_cli.reports import to_json
from svdq_cli.runtime.linear import w4a4_exact, w4a16_exact

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
CPU = torch.device("cpu")
QUICK = 1e-3  # seconds for each row: the least number of samples
SMALL = ShapeSet(
    "small",
    "awkward numbers of rows",
    (
        LinearShape("one row", 1, 128, 256),
        LinearShape("odd", 17, 256, 128),
        LinearShape("modulation", 3, 128, 384, "w4a16"),
    ),
)
ROW_KEYS = {
    *("op", "mode", "precision", "m", "k", "n", "rank", "us"),
    *("tflops", "baseline", "ratio", "branch_cost", "floor_us", "relative_error", "exactness"),
}

# One rounding to bfloat16 is at most 2^-8 of the value, float32 sums of 256 terms are a thousand times finer.
ONE_ROUNDING = 2**-8
LARGEST_ERROR = {
    ("linear", "float32"): 1e-6,  # 256 float32 sums, each 2^-24
    ("linear", "bfloat16"): ONE_ROUNDING,  # the result
    ("w4a4 linear", "int4"): 2 * ONE_ROUNDING,  # hidden vector and result
    ("w4a4 linear", "nvfp4"): 2 * ONE_ROUNDING,
    ("w4a16 linear", "int4"): 2 * ONE_ROUNDING,  # weight and result
    ("linear", "int4"): 2 * ONE_ROUNDING,  # the engine: hidden vector and result
    ("linear", "nvfp4"): 2 * ONE_ROUNDING,
    ("linear", "w4a16 int4"): 2 * ONE_ROUNDING,
    ("quantize and down", "int4"): ONE_ROUNDING,  # hidden vector
    ("quantize and down", "nvfp4"): ONE_ROUNDING,
    ("gemm", "int8"): 0.0,  # integers
    **{(f"rotated w4a{bits} linear", "int4"): ONE_ROUNDING for bits in (4, 8)},  # the result
}


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return bench_shapes(
        SMALL, precisions=precisions_named(None), rank=16, settings=BenchSettings(CPU, seconds_per_row=QUICK)
    )


@pytest.fixture(scope="module")
def folder(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "int4"
    convert(default_recipe(str(tiny_flux)), path, options=RunOptions(device="cpu"))
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


def w4a4_of(checkpoint: Checkpoint) -> W4A4Solution:
    return next(s for plan in checkpoint.layers if isinstance(s := checkpoint.solution(plan), W4A4Solution))


def w4a16_of(checkpoint: Checkpoint) -> W4A16Solution:
    return next(s for plan in checkpoint.layers if isinstance(s := checkpoint.solution(plan), W4A16Solution))


def rows_of(report: BenchReport, op: str) -> list[BenchRow]:
    return [row for row in report.rows if row.op == op]


def assert_measured(row: BenchRow) -> None:
    for value in (row.us.median, row.us.p10, row.us.p90, row.tflops, row.ratio):
        assert math.isfinite(value)
        assert value > 0
    assert row.relative_error is not None
    assert 0 <= row.relative_error < 0.1
    assert row.us.p10 <= row.us.median <= row.us.p90


# ------------------------------------------------------------------------------------------ the report


def test_the_report_has_the_keys_of_the_contract(report: BenchReport):
    plain = to_json(report)
    assert list(plain)[:3] == ["schema", "command", "status"]
    assert {"device", "rows", "notes"} <= set(plain)
    assert {"name", "sm", "backend", "driver", "cuda"} <= set(plain["device"])  # type: ignore[arg-type]
    for row in plain["rows"]:  # type: ignore[attr-defined]
        assert set(row) >= ROW_KEYS
        assert list(row["us"]) == ["median", "p10", "p90"]


def test_every_row_is_finite_and_positive(report: BenchReport):
    assert report.rows
    for row in report.rows:
        assert_measured(row)


def test_every_shape_is_measured_in_every_way_beside_both_baselines(report: BenchReport):
    ways = {
        (row.layer, row.op, row.mode, row.precision, row.rank)
        for row in report.rows
        if (row.m, row.k, row.n) == (17, 256, 128)
    }
    assert ways == {
        ("odd", "linear", "torch", "float32", None),
        ("odd", "linear", "torch", "bfloat16", None),
        ("odd", "gemm", "torch", "int8", None),
        ("odd", "linear", "torch", "w4a16 int4", None),
        *(("odd", "w4a4 linear", "reference", name, 16) for name in ("int4", "nvfp4")),
        *(("odd", "linear", "fused", name, 16) for name in ("int4", "nvfp4")),
        *(("odd", "linear", "no-branch", name, 0) for name in ("int4", "nvfp4")),
        *(("odd", "linear", "unfused-branch", name, 16) for name in ("int4", "nvfp4")),
        *(("odd", "quantize and down", "fused", name, 16) for name in ("int4", "nvfp4")),
    }
    assert [(row.m, row.k, row.n) for row in rows_of(report, "w4a16 linear")] == [(3, 128, 384)]


def test_ratios_refer_to_the_baseline_of_the_same_shape_and_run(report: BenchReport):
    names = {"bfloat16": "torch-bf16", "float32": "torch-fp32"}
    of_shape = {
        (row.m, row.k, row.n, names[row.precision]): row for row in report.rows if row.precision in names
    }
    for row in report.rows:
        baseline = of_shape[row.m, row.k, row.n, row.baseline]
        assert row.ratio == baseline.us.median / row.us.median


def test_what_a_branch_costs_is_told_where_its_layer_ran_in_turns_with_the_bare_one(report: BenchReport):
    told = {(row.op, row.mode) for row in report.rows if row.branch_cost is not None}
    assert told == {("linear", "fused"), ("linear", "unfused-branch")}
    assert all(
        (row.branch_cost is not None) == (row.rank == 16)
        for row in report.rows
        if row.mode == "unfused-branch"
    )


def test_the_engines_layers_stand_beside_both_of_torchs_dtypes(report: BenchReport):
    fused = [row for row in report.rows if row.mode == "fused" and row.op == "linear"]
    beside = {(row.layer, row.precision): set() for row in fused}
    for row in fused:
        beside[row.layer, row.precision].add(row.baseline)
    assert all(names == {"torch-bf16", "torch-fp32"} for names in beside.values())
    assert len(beside) == 5


def test_gates_speak_of_the_engines_layers_against_bfloat16(report: BenchReport):
    mine = [
        row.ratio
        for row in report.rows
        if (row.mode, row.op, row.baseline) == ("fused", "linear", "torch-bf16") and row.rank
    ]
    found = judged(report, []).speed_ratio
    assert found is not None
    assert (found.mean, found.min) == (pytest.approx(sum(mine) / len(mine)), min(mine))


def test_without_the_engine_the_reference_backend_is_measured(monkeypatch: pytest.MonkeyPatch):
    lack = EnvironmentLacksError("no C++ compiler", hint="install one")
    for module in ("run", "device"):
        monkeypatch.setattr(f"svdq_cli.bench.{module}.lack_of_engine", lambda: lack)
    shapes = replace(SMALL, shapes=SMALL.shapes[1:2])
    settings = BenchSettings(CPU, seconds_per_row=QUICK)
    found = bench_shapes(shapes, precisions=precisions_named("int4"), rank=16, settings=settings)
    assert found.device.backend == "reference"
    assert [(row.mode, row.rank) for row in found.rows if row.rank is not None] == [
        ("reference", 16),
        ("reference", 0),
    ]
    assert "Figures of the reference backend" in found.notes[0]
    with pytest.raises(
        EnvironmentLacksError, match="a step on a CPU needs svdq's engine: no C\\+\\+ compiler"
    ):
        with_steps(found, precisions_named("int4"), settings=settings)


def test_errors_are_those_of_the_roundings_that_the_row_admits(report: BenchReport):
    for row in report.rows:
        assert row.relative_error is not None
        assert row.relative_error <= LARGEST_ERROR[row.op, row.precision]
        assert ("rounded to bfloat16" in row.exactness) == (row.precision not in ("float32", "int8"))


def test_on_a_cpu_the_notes_say_that_this_is_no_gpu_figure(report: BenchReport):
    assert report.device.sm is None
    assert report.device.backend == "cpu"
    assert "say nothing about speed on a GPU" in report.notes[0]


def test_without_rank_there_is_no_second_row_for_the_branch():
    settings = BenchSettings(CPU, m=2, seconds_per_row=QUICK)
    shapes = replace(SMALL, shapes=SMALL.shapes[:1])
    found = bench_shapes(shapes, precisions=precisions_named("int4"), rank=0, settings=settings)
    ours = [row for row in found.rows if row.rank is not None and row.baseline == "torch-bf16"]
    assert [(row.m, row.mode, row.rank) for row in ours] == [(2, "reference", 0), (2, "fused", 0)]


# ------------------------------------------------------------------------------------------ a checkpoint


def test_a_checkpoint_gives_rows_for_every_distinct_layer(checkpoint: Checkpoint):
    settings = BenchSettings(CPU, m=5, seconds_per_row=QUICK)
    found = bench_layers(checkpoint.layers, checkpoint.solution, settings=settings)
    wanted = {
        (plan.linear.in_features, plan.linear.out_features, plan.rank if isinstance(plan, W4A4Plan) else None)
        for plan in checkpoint.layers
    }
    stored = [row for row in found.rows if row.mode == "reference" and row.rank != 0]
    assert {(row.k, row.n, row.rank) for row in stored} == wanted
    assert len(stored) == len(wanted)
    assert {row.layer for row in stored} <= {plan.name for plan in checkpoint.layers}
    assert {row.m for row in stored} == {5, 1}  # a modulation layer reads one row for each picture
    for row in found.rows:
        assert_measured(row)
        assert row.relative_error is not None
        assert row.relative_error <= LARGEST_ERROR[row.op, row.precision]


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_file_of_comfyui_s_own_loader_is_measured_too(precision: str, tiny_flux: Path, tmp_path: Path):
    file = tmp_path / "comfy-core.safetensors"
    recipe = with_overrides(
        default_recipe(str(tiny_flux)),
        {
            "quantization.precision": precision,
            "quantization.effort": "datafree",
            "outputs": [{"format": "comfy-core", "path": str(file)}],
        },
    )
    convert(recipe, file, options=RunOptions(device="cpu"))
    checkpoint = open_checkpoint(file)
    settings = BenchSettings(CPU, m=5, seconds_per_row=QUICK)
    found = bench_layers(checkpoint.layers, checkpoint.solution, settings=settings)
    rotated = {plan.linear.in_features for plan in checkpoint.layers if isinstance(plan, RotatedPlan)}
    measured = rows_of(found, "rotated w4a4 linear")
    assert {(row.k, row.m, row.rank) for row in measured} == {(k, 5, None) for k in rotated}
    assert any("no kernel of svdq rotates" in note for note in found.notes) == bool(rotated)
    assert bool(rotated) == (precision == "int4")
    for row in found.rows:
        assert_measured(row)
        assert row.relative_error is not None
        assert row.relative_error <= LARGEST_ERROR[row.op, row.precision]


def test_a_layer_that_is_not_finite_is_named_and_not_timed(checkpoint: Checkpoint):
    solution = w4a4_of(checkpoint)
    broken = replace(solution, scales=torch.full_like(solution.scales, float("nan")))
    with pytest.raises(InputError, match="not finite") as refusal:
        bench_layers(
            [solution.plan], lambda plan: broken, settings=BenchSettings(CPU, m=2, seconds_per_row=QUICK)
        )
    assert refusal.value.where == solution.plan.name


# ------------------------------------------------------------------------------------------ definitions


def test_the_definitions_in_float64_are_the_runtimes_contract_values(checkpoint: Checkpoint):
    w4a4 = w4a4_of(checkpoint)
    w4a16 = w4a16_of(checkpoint)
    x = torch.randn(9, w4a4.codes.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    # float32 sums of 128 terms of order 1
    torch.testing.assert_close(w4a4_exact(x, w4a4).double(), w4a4_float64(x, w4a4), rtol=0, atol=2e-5)
    torch.testing.assert_close(w4a16_exact(x, w4a16).double(), w4a16_float64(x, w4a16), rtol=0, atol=2e-5)


def test_leaving_the_branch_out_changes_nothing_else(checkpoint: Checkpoint):
    solution = w4a4_of(checkpoint)
    bare = without_branch(solution)
    assert (reference_linear(bare).rank, bare.plan.rank) == (0, 0)
    assert torch.equal(bare.codes, solution.codes)
    assert torch.equal(bare.scales, solution.scales)


def test_the_demo_shapes_are_those_of_the_embedded_model():
    from tools.train_demo.denoiser import new_transformer

    found = {
        (module.in_features, module.out_features)
        for name, module in new_transformer().named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in name
    }
    assert {(shape.k, shape.n) for shape in DEMO.shapes} == found


# ------------------------------------------------------------------------------------------ timing


def test_calls_take_turns_and_are_sampled_often_enough():
    made: list[int] = []
    us = measure([lambda i=i: made.append(i) for i in range(3)], seconds=1e-9, device=CPU)
    assert len(made) >= LEAST_SAMPLES["cpu"]
    assert made == [i % 3 for i in range(len(made))]
    assert us.p10 <= us.median <= us.p90


def test_operands_together_exceed_the_cache_and_large_ones_still_rotate():
    assert copies_beyond_cache(2**20, CPU) * 2**20 > 64 * 2**20
    assert copies_beyond_cache(2**30, CPU) == 3
    assert copies_beyond_cache(1, CPU) == MOST_COPIES


# ------------------------------------------------------------------------------------------ the command


def test_bench_of_a_checkpoint_prints_one_json_object(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run(["bench", str(folder), "--m", "3", "--seconds", "0.001", "--device", "cpu", "--json", "-q"]) == 0
    )
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["schema"], found["command"], captured.err) == (1, "bench", "")
    assert {row["op"] for row in found["rows"]} == {
        *("linear", "gemm", "quantize and down", "w4a4 linear", "w4a16 linear")
    }


def test_the_table_fits_80_columns_and_ends_with_the_notes(
    report: BenchReport, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    slow = Microseconds(median=1781434.2, p10=1e6, p90=2e7)
    large = [replace(row, m=4608, k=15360, n=21504, us=slow, tflops=0.000063) for row in report.rows]
    show(replace(report, rows=(*report.rows, *large)), json=False)
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("op "))
    assert " ".join(header.split()) == "op precision M K N R us spread TFLOP/s ratio error"
    assert "…" not in text
    assert text.rstrip().endswith(report.notes[-1])


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        ("--shapes flux-dev", 2, "'flux-dev'", "did you mean 'flux1-dev'? the sets are demo, flux1-dev"),
        ("--precision int8", 2, "'int8'", "int4 or nvfp4"),
        ("--rank 24", 2, "--rank 24", "a multiple of 16 from 0 to 256"),
        ("--rank 512", 2, "--rank 512", "a multiple of 16 from 0 to 256"),
        ("--m 0", 2, "--m 0", "positive"),
        ("--seconds 0", 2, "--seconds 0", "positive"),
        ("--seconds nan", 2, "--seconds nan", "positive"),
        ("no-such-folder", 3, "no such file or folder", "svdq convert"),
        ("no-such-folder --rank 16", 2, "--rank and a checkpoint", "leave out --rank"),
        ("no-such-folder --shapes demo", 2, "--shapes and a checkpoint", "leave out --shapes"),
        ("--device cuda:99", 4, "cuda:99", "svdq doctor"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_valid_choices(
    words: str, code: int, message: str, hint: str, capsys: pytest.CaptureFixture[str]
):
    device = "" if "--device" in words else "--device cpu"
    assert run(f"bench {words} {device} --json -q".split()) == code
    error = json.loads(capsys.readouterr().out)["error"]
    assert message in error["message"]
    assert hint in error["hint"]


def test_settings_and_sets_are_refused_by_the_library_too():
    with pytest.raises(UsageError, match="at least one row"):
        BenchSettings(CPU, m=-1)
    assert all(shape.k % 64 == 0 for shapes in SHAPE_SETS.values() for shape in shapes.shapes)
