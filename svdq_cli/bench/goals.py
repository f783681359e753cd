"""What the kernels were built to reach on an H200, and which of it a benchmark found. kernels/NOTES.md says why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from svdq_cli.bench.report import BenchRow, StepRow

LEAST_ROWS = 4096  # goals are for the rows of an image
LONG_K = 12288  # from which the branch may cost less
GEMM, LINEAR, QUANTIZE = "w4a4 gemm", "w4a4 linear", "quantize and down"


@dataclass(frozen=True, slots=True)
class ModeGoals:
    """Ratios are times of a baseline over ours: above 1 is faster."""

    mode: str  # as BenchRow.mode
    gemm: float | None  # over bfloat16: product, branch and bias
    linear: float | None  # over bfloat16: the whole layer
    over_w4a16: float
    most_floors: float  # time of the first kernel over that of its least bytes


MODE_GOALS = (
    ModeGoals("kernels", 0.6, None, 1.5, 1.6),
    ModeGoals("hopper exact", 1.2, 1.1, 2.5, 1.4),
    ModeGoals("hopper w4a8", 1.45, 1.3, 2.5, 1.4),
    ModeGoals("hopper fp8", 1.55, 1.38, 2.5, 1.4),
)
MOST_BRANCH, MOST_BRANCH_LONG_K = 1.05, 1.02  # time with the branch over that without
STEP_SPEEDS = {"int4 hopper exact": 1.2, "int4 hopper w4a8": 1.35}  # over bfloat16, eager and compiled
STEP_MEMORY = 3.3


@dataclass(frozen=True, slots=True)
class GoalRow:
    """One goal, on one shape."""

    goal: str
    layer: str
    wanted: str
    found: float
    met: bool


def layer_goals(rows: Sequence[BenchRow]) -> Iterator[GoalRow]:
    """Goals of single layers, for every int4 shape with enough rows that was measured."""
    for layer in dict.fromkeys(row.layer for row in rows if row.m >= LEAST_ROWS):
        here = [row for row in rows if row.layer == layer]
        for goals in MODE_GOALS:
            yield from _mode_goals(here, goals)


def _mode_goals(rows: Sequence[BenchRow], goals: ModeGoals) -> Iterator[GoalRow]:
    mine = [row for row in rows if row.mode == goals.mode and row.precision == "int4"]
    w4a16 = next((row for row in rows if row.precision == "w4a16 int4"), None)
    bare = next((row for row in mine if row.op == GEMM and row.rank == 0), None)
    for row in mine:
        if row.op == GEMM and row.rank and goals.gemm:
            yield _at_least("product over bfloat16", row, goals.gemm, row.ratio)
        if row.op == LINEAR and row.rank and goals.linear:
            yield _at_least("layer over bfloat16", row, goals.linear, row.ratio)
        if row.op == LINEAR and row.rank and w4a16 is not None:
            yield _at_least("layer over w4a16", row, goals.over_w4a16, w4a16.us.median / row.us.median)
        if row.op == GEMM and row.rank and bare is not None:
            most = MOST_BRANCH_LONG_K if row.k >= LONG_K else MOST_BRANCH
            yield _at_most("product with branch over without", row, most, row.us.median / bare.us.median)
        if row.op == QUANTIZE and row.floor_us:
            yield _at_most(
                "first kernel over its floor", row, goals.most_floors, row.us.median / row.floor_us
            )


def step_goals(rows: Sequence[StepRow]) -> Iterator[GoalRow]:
    """Goals of a whole step: the fastest way to run ours against the 16-bit model, eager and compiled."""
    baselines = {row.mode: row for row in rows if row.precision == "bfloat16"}
    for name in dict.fromkeys(row.precision for row in rows):
        mine = [row for row in rows if row.precision == name]
        if name == "bfloat16":
            continue
        fastest = min(mine, key=lambda row: row.us.median)
        for mode in ("eager", "torch.compile"):
            if name in STEP_SPEEDS and mode in baselines:
                found = baselines[mode].us.median / fastest.us.median
                wanted = STEP_SPEEDS[name]
                yield GoalRow(f"step over bfloat16 {mode}", name, f">= {wanted:g}", found, found >= wanted)
        memory = [row.memory_ratio for row in mine if row.memory_ratio is not None]
        if memory and "fp8" not in name:  # fp8 weights take twice the bytes
            found = max(memory)
            yield GoalRow(
                "memory of bfloat16 over ours", name, f">= {STEP_MEMORY:g}", found, found >= STEP_MEMORY
            )


def _at_least(goal: str, row: BenchRow, wanted: float, found: float) -> GoalRow:
    return GoalRow(f"{row.mode}: {goal}", row.layer, f">= {wanted:g}", found, found >= wanted)


def _at_most(goal: str, row: BenchRow, wanted: float, found: float) -> GoalRow:
    return GoalRow(f"{row.mode}: {goal}", row.layer, f"<= {wanted:g}", found, found <= wanted)
