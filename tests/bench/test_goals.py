"""Goals are found in a report's rows, and missed ones are not called met."""

from __future__ import annotations

from svdq_cli.bench.goals import layer_goals, step_goals
from svdq_cli.bench.report import BenchRow, Microseconds, StepRow


def row(op: str, mode: str, us: float, **more) -> BenchRow:
    facts = {"precision": "int4", "m": 4096, "k": 3072, "n": 9216, "rank": 32, "floor_us": None, **more}
    return BenchRow(
        layer="qkv",
        op=op,
        mode=mode,
        us=Microseconds(us, us, us),
        tflops=1.0,
        baseline="torch linear bfloat16",
        ratio=300 / us,
        branch_cost=None,
        relative_error=1e-3,
        exactness="",
        **facts,
    )


ROWS = [
    row("linear", "torch", 300.0, precision="bfloat16", rank=None),
    row("linear", "torch", 700.0, precision="w4a16 int4", rank=None),
    row("w4a4 gemm", "hopper w4a8", 200.0),
    row("w4a4 gemm", "hopper w4a8", 192.0, rank=0),
    row("w4a4 linear", "hopper w4a8", 240.0),
    row("quantize and down", "hopper w4a8", 15.0, floor_us=10.0),
]


def goals_of(rows: list[BenchRow]) -> dict[str, tuple[float, bool]]:
    return {goal.goal: (round(goal.found, 3), goal.met) for goal in layer_goals(rows)}


def test_every_goal_of_a_mode_is_judged_by_its_rows():
    assert goals_of(ROWS) == {
        "hopper w4a8: product over bfloat16": (1.5, True),
        "hopper w4a8: product with branch over without": (1.042, True),
        "hopper w4a8: layer over bfloat16": (1.25, False),
        "hopper w4a8: layer over w4a16": (2.917, True),
        "hopper w4a8: first kernel over its floor": (1.5, False),
    }


def test_the_branch_may_cost_less_where_k_is_long():
    long = [row("w4a4 gemm", "hopper w4a8", us, k=12288, rank=rank) for us, rank in ((200.0, 32), (192.0, 0))]
    assert goals_of(long)["hopper w4a8: product with branch over without"] == (1.042, False)


def test_goals_are_for_the_rows_of_an_image():
    assert goals_of([row("w4a4 gemm", "hopper w4a8", 200.0, m=512)]) == {}


def step(precision: str, mode: str, us: float, memory: float | None) -> StepRow:
    return StepRow("flux", precision, mode, 32, Microseconds(us, us, us), 1.0, 1, memory)


def test_a_step_is_judged_by_its_fastest_way_against_both_baselines():
    found = list(
        step_goals(
            [
                step("bfloat16", "eager", 130.0, None),
                step("bfloat16", "torch.compile", 110.0, 1.0),
                step("int4 hopper exact", "eager", 120.0, 3.4),
                step("int4 hopper exact", "CUDA graph", 100.0, 3.2),
                step("int4 hopper fp8", "CUDA graph", 80.0, 1.8),
            ]
        )
    )
    assert [(goal.goal, goal.layer, round(goal.found, 2), goal.met) for goal in found] == [
        ("step over bfloat16 eager", "int4 hopper exact", 1.3, True),
        ("step over bfloat16 torch.compile", "int4 hopper exact", 1.1, False),
        ("memory of bfloat16 over ours", "int4 hopper exact", 3.4, True),
    ]
