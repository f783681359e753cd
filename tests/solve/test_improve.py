"""The steps beyond the paper: each pays on rows it did not see, and none can make a layer worse than its search."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from svdq_cli.recipe.schema import STEPS_OF_EFFORT
from svdq_cli.records import Effort, Int4, NvFp4, Precision, SearchStep, SolveSettings
from svdq_cli.solve.forward import output_sqnr_db
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.solve.quantizers import (
    dequantize_weight,
    fake_quantize_activation,
    fake_quantize_weight,
    int4_extremes,
    int4_scales,
    quantize_weight,
)
from svdq_cli.solve.refit import RIDGE, refit_branch, refit_inputs
from svdq_cli.solve.rounding import DAMPING, Int4Grid, gptq, gptq_weight
from svdq_cli.solve.steps import STEPS, LayerSizes, steps_for
from svdq_cli.solve.work import Work
from tests.solve.test_linear import SHARED, plans, stats_of, weights

BOTH = pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda p: p.name)


def correlated_rows(count: int, seed: int) -> torch.Tensor:
    """(count, 256) with a decaying spectrum and a few strong channels, as real activations have."""
    mixing = torch.randn(256, 256, generator=torch.Generator().manual_seed(9)) / 16
    rows = torch.randn(count, 256, generator=torch.Generator().manual_seed(seed))
    rows = (rows * torch.linspace(3, 0.1, 256)) @ mixing
    rows[:, ::41] *= 20
    return rows


def solved(precision: Precision, effort: Effort, rows: torch.Tensor) -> SolvedInput:
    return solved_by(STEPS_OF_EFFORT[effort], precision, rows)


def solved_by(steps: tuple[SearchStep, ...], precision: Precision, rows: torch.Tensor) -> SolvedInput:
    settings = SolveSettings("grid", 0, torch.bfloat16, steps)
    return solve_input(SHARED, plans(precision), weights(), stats_of(rows), settings)


def fresh_db(result: SolvedInput) -> float:
    """Mean SQNR on rows that no step has seen."""
    x = correlated_rows(300, seed=77)
    figures = [output_sqnr_db(x, weights()[s.plan.name].weight, s) for s in result.w4a4]
    return sum(figures) / len(figures)


@BOTH
def test_fast_beats_the_papers_search_on_fresh_rows_and_balanced_beats_both(precision: Precision):
    rows = correlated_rows(1000, seed=5)
    paper = solved_by((), precision, rows)
    fast, balanced = solved(precision, "fast", rows), solved(precision, "balanced", rows)
    # on the trained layers this was developed with the gains are 0.7 and 2 dB; this small world gives half of that
    assert fresh_db(fast) > fresh_db(paper) + 0.35
    assert fresh_db(balanced) > fresh_db(paper) + 1.0
    assert list(fast.reports[0].search.steps_db) == ["start", "refine"]
    for report in balanced.reports:
        assert list(report.search.steps_db) == ["start", "learned", "refine", "gptq", "refit"]


@BOTH
def test_balanced_with_too_few_rows_is_fast(precision: Precision):
    rows = correlated_rows(40, seed=5)
    for one, other in zip(
        solved(precision, "fast", rows).w4a4, solved(precision, "balanced", rows).w4a4, strict=True
    ):
        assert torch.equal(one.codes, other.codes)
    (reason,) = solved(precision, "balanced", rows).reports[0].search.fallback
    assert reason == "40 calibration rows, but 64 are needed to learn and to validate"


@BOTH
@pytest.mark.parametrize("kind", ["zeros", "one exploding channel", "identical rows"])
def test_odd_activations_leave_balanced_finite(precision: Precision, kind: str):
    rows = correlated_rows(200, seed=6)
    match kind:
        case "zeros":
            rows = torch.zeros_like(rows)
        case "one exploding channel":
            rows[:, 3] *= 1e4
        case _:
            rows = rows[:1].expand(200, -1).clone()
    balanced = solved(precision, "balanced", rows)
    for solution in balanced.w4a4:
        for tensor in (solution.smooth, solution.down, solution.up, solution.scales):
            assert torch.isfinite(tensor.float()).all()
    # steps are judged on the last rows and reported on all, which may differ by a few per cent
    noise = sum(10 ** (-r.sqnr_db / 10) for r in balanced.reports)
    assert noise <= 1.05 * sum(10 ** (-r.sqnr_db / 10) for r in solved_by((), precision, rows).reports)
    if kind == "zeros":
        assert "gptq: no usable activations" in balanced.reports[0].search.fallback


@BOTH
def test_gptq_loses_less_output_than_nearest(precision: Precision):
    rows = correlated_rows(2000, seed=1)
    weight = weights()["q"].weight
    hessian = rows.T @ rows / len(rows)
    round_to_nearest = dequantize_weight(quantize_weight(weight, precision, dtype=torch.bfloat16), precision)
    rounded = gptq_weight(weight, hessian, precision, dtype=torch.bfloat16, parts=(weight.shape[0],))
    assert rounded is not None
    fresh = correlated_rows(500, seed=2)
    noise = [
        float((fresh @ (q - weight).T).square().sum())
        for q in (dequantize_weight(rounded, precision), round_to_nearest)
    ]
    assert noise[0] < 0.6 * noise[1]


@BOTH
def test_gptq_has_nothing_to_say_without_activations(precision: Precision):
    weight = weights()["q"].weight
    assert gptq_weight(weight, torch.zeros(256, 256), precision, dtype=torch.bfloat16, parts=(64, 64)) is None


def test_gptq_rounds_as_published_with_the_inverse_hessian():
    weight, rows = (
        torch.randn(32, 128, generator=torch.Generator().manual_seed(1)),
        correlated_rows(900, seed=3),
    )
    hessian = rows[:, :128].T @ rows[:, :128] / 900
    grid = Int4Grid(torch.bfloat16)
    scales = int4_scales(int4_extremes(weight.reshape(32, 2, 64)), torch.bfloat16)
    found = gptq(weight, hessian, grid, parameters=(scales,))
    damped = hessian.double() + DAMPING * hessian.diagonal().mean() * torch.eye(128)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    left = weight.clone()
    for column in range(128):
        code, value = grid.round(left[:, column], (scales[:, column // 64],))
        assert found is not None
        assert torch.equal(found.codes[:, column], code)
        lost = (left[:, column] - value) / inverse[column, column]
        left[:, column:] -= torch.outer(lost, inverse[column, column:])


def test_the_refit_finds_a_missing_low_rank_term():
    rows = correlated_rows(2000, seed=3)
    generator = torch.Generator().manual_seed(4)
    four_bit, up, down = (
        torch.randn(*size, generator=generator) for size in ((128, 256), (128, 8), (8, 256))
    )
    whole = four_bit + up @ down
    inputs = refit_inputs(rows, rows.clone())
    assert inputs is not None
    found_up, found_down = refit_branch(inputs, whole.clone(), four_bit, 0.7 * up, down, seed=0)
    left = (rows @ (up @ down - found_up @ found_down).T).norm() / (rows @ (up @ down).T).norm()
    assert float(left) < 0.05  # 0.3 before; the ridge keeps it from being exact


def test_the_refit_takes_back_what_the_input_quantizer_does_as_far_as_a_branch_can():
    rows = correlated_rows(2000, seed=3)
    generator = torch.Generator().manual_seed(4)
    weight, up = torch.randn(96, 256, generator=generator), torch.randn(96, 8, generator=generator)
    down = torch.linalg.lstsq(up, weight).solution
    quantized = fake_quantize_activation(rows, Int4())
    four_bit = fake_quantize_weight(weight - up @ down, Int4(), dtype=torch.bfloat16)
    missing = rows @ weight.T - quantized @ four_bit.T
    inputs = refit_inputs(rows, quantized.clone())
    assert inputs is not None
    found = refit_branch(inputs, weight.clone(), four_bit, up, down, seed=0)
    # the same by its definition, with all of the matrices
    gram = rows.T @ rows
    ridge = RIDGE * gram.diagonal().mean()
    root = torch.linalg.cholesky(gram + ridge * torch.eye(256))
    target = torch.linalg.solve_triangular(root, rows.T @ missing + ridge * (up @ down).T, upper=False)
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    best = torch.linalg.solve_triangular(root.T, left[:, :8] * values[:8] @ right[:8], upper=True).T

    def error(product: torch.Tensor) -> float:
        pulled = ridge * (product - up @ down).square().sum()
        return float((missing - rows @ product.T).square().sum() + pulled)

    assert error(up @ down) > 1.02 * error(best)
    assert error(found[0] @ found[1]) < error(best) + 0.1 * (error(up @ down) - error(best))


@BOTH
def test_searching_scales_pays_over_gptq_as_published(precision: Precision):
    stats = stats_of(correlated_rows(1000, seed=5))

    def reached(*steps: SearchStep) -> float:
        settings = SolveSettings("grid", 0, torch.bfloat16, steps)
        return fresh_db(solve_input(SHARED, plans(precision), weights(), stats, settings))

    assert reached("gptq", "scales") > reached("gptq")


def test_no_step_fits_a_branch_where_there_is_none():
    steps: tuple[SearchStep, ...] = ("refine", "gptq", "refit")
    settings = SolveSettings("grid", 0, torch.bfloat16, steps)
    assert steps_for(settings, branched=True) == steps
    assert steps_for(settings, branched=False) == ("gptq",)
    assert steps_for(replace(settings, refinements=0), branched=True) == ("gptq", "refit")


@BOTH
def test_refining_brings_stored_weights_nearer_in_smoothed_coordinates(precision: Precision):
    stats = stats_of(correlated_rows(1000, seed=5))

    def weight_errors(*steps: SearchStep) -> list[float]:
        settings = SolveSettings("grid", 0, torch.bfloat16, steps)
        solved = solve_input(SHARED, plans(precision), weights(), stats, settings)
        return [report.weight_error for report in solved.reports]

    assert sum(weight_errors("refine")) < 0.9 * sum(weight_errors())


def test_every_step_of_the_recipe_has_a_record_with_its_cost():
    assert list(STEPS) == list(get_args(SearchStep))
    sizes = LayerSizes([(128, 16)], 64, 448, Work(matmul=1.0), Int4())
    for step in STEPS.values():
        assert (step.run is None) == (step.work(sizes) == Work())
