"""What the search promises: outliers are moved and taken in, the same input gives the same bytes, nothing breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdq_cli.errors import UsageError
from svdq_cli.records import (
    ActivationStats,
    Int4,
    Linear,
    NvFp4,
    Precision,
    SharedInput,
    Smoothing,
    SolveSettings,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.runtime.linear import w4a4_forward
from svdq_cli.solve.forward import LinearWeights, decibels, output_of, output_sqnr_db
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.solve.low_rank import split_low_rank
from svdq_cli.solve.modulation import dequantize_w4a16, solve_w4a16
from svdq_cli.solve.rebuild import relative_error, weight_error
from svdq_cli.solve.rounding import AffineGrid
from svdq_cli.solve.smoothing_methods import Stack
from tests.allocations import Allocations

K, N, ROWS = 256, 128, 400
NAMES = ("q", "k", "v", "mlp")
SHARED = SharedInput("q", NAMES, (("q", "k", "v"), ("mlp",)))


def weights(seed: int = 0) -> dict[str, LinearWeights]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LinearWeights(torch.randn(N, K, generator=generator) / 16, torch.randn(N, generator=generator))
        for name in NAMES
    }


def rows_with_outliers(strength: float = 30.0, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, K, generator=generator)
    rows[:, ::41] *= strength
    return rows.bfloat16()


def stats_of(rows: torch.Tensor) -> ActivationStats:
    x = rows.float()
    return ActivationStats("q", x.abs().amax(0), x.square().mean(0), rows.bfloat16(), len(rows))


def plans(precision: Precision, rank: int = 16) -> dict[str, W4A4Plan | W4A16Plan]:
    return {name: W4A4Plan(Linear(name, K, N, bias=True), precision, rank) for name in NAMES}


def solved(
    precision: Precision, smoothing: Smoothing = "grid", *, rows: torch.Tensor | None = None, rank: int = 16
) -> SolvedInput:
    settings = SolveSettings(smoothing, 0, torch.bfloat16)
    stats = stats_of(rows_with_outliers() if rows is None else rows)
    return solve_input(SHARED, plans(precision, rank), weights(), stats, settings)


def mean_db(result: SolvedInput) -> float:
    return sum(report.sqnr_db for report in result.reports) / len(result.reports)


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda p: p.name)
def test_the_grid_beats_closed_form_which_beats_no_smoothing_on_outliers(precision: Precision):
    none, closed, grid = (mean_db(solved(precision, way)) for way in ("none", "closed-form", "grid"))
    assert none + 3 < closed <= grid + 0.01


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda p: p.name)
def test_the_reported_sqnr_is_that_of_the_stored_solution_as_it_runs(precision: Precision):
    result = solved(precision)
    x = rows_with_outliers().float()
    for solution, report in zip(result.w4a4, result.reports, strict=True):
        exact = (x @ weights()[solution.plan.name].weight.T).double()
        bias = 0.0 if solution.bias is None else solution.bias.double()
        noise = w4a4_forward(x, solution).double() - bias - exact
        wanted = decibels(exact.square().sum(), noise.square().sum())
        # sums in another order round a few outputs the other way
        assert wanted == pytest.approx(report.sqnr_db, abs=1e-3)


def test_an_output_that_16_bits_do_not_hold_is_no_output():
    plan = W4A4Plan(Linear("v", 64, 16, bias=False), Int4(), 0)
    weight = torch.full((16, 64), 2000.0)
    solution = W4A4Solution(
        plan,
        smooth=torch.ones(64, dtype=torch.float16),
        down=torch.empty(0, 64, dtype=torch.float16),
        up=torch.empty(16, 0, dtype=torch.float16),
        codes=torch.full((16, 64), 7, dtype=torch.int8),
        scales=torch.full((16, 1), 2000 / 7, dtype=torch.float16),
        outer=None,
        bias=None,
    )
    assert output_sqnr_db(torch.full((4, 64), 0.25), weight, solution) > 60  # 32 000 each
    assert output_sqnr_db(torch.full((4, 64), 1.0), weight, solution) == -150.0  # 128 000 each


def test_a_larger_rank_is_better():
    assert mean_db(solved(Int4(), rank=64)) > mean_db(solved(Int4(), rank=16)) + 0.2


@pytest.mark.parametrize(("n", "k"), [(64, 4096), (4096, 64)])
def test_an_exact_branch_takes_memory_for_the_weight_and_not_for_the_square_of_its_longer_side(
    n: int, k: int
):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    with Allocations() as seen:
        up, down = split_low_rank(weight, rank=64, seed=0, smooth=torch.full((k,), 2.0))
    assert torch.allclose(up @ down, 2 * weight, atol=1e-3)
    # the product, what its decomposition takes and gives, and the factors
    assert seen.most < 8 * weight.nbytes


def test_layers_of_one_branch_share_the_down_projection_and_all_share_the_smoothing():
    by_name = {solution.plan.name: solution for solution in solved(Int4()).w4a4}
    assert torch.equal(by_name["q"].down, by_name["v"].down)
    assert not torch.equal(by_name["q"].down, by_name["mlp"].down)
    assert all(torch.equal(by_name["q"].smooth, solution.smooth) for solution in by_name.values())


def test_two_ranks_in_one_branch_are_refused():
    mixed = plans(Int4())
    mixed["k"] = replace(mixed["k"], rank=32)
    with pytest.raises(UsageError, match="share one down projection"):
        solve_input(
            SHARED,
            mixed,
            weights(),
            stats_of(rows_with_outliers()),
            SolveSettings("none", 0, torch.bfloat16),
        )


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda p: p.name)
def test_the_same_input_gives_the_same_bytes(precision: Precision):
    for first, second in zip(solved(precision).w4a4, solved(precision).w4a4, strict=True):
        for name in ("smooth", "down", "up", "codes", "scales"):
            assert torch.equal(
                getattr(first, name).view(torch.uint8), getattr(second, name).view(torch.uint8)
            ), name


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["all zero", "dead channels", "one exploding channel", "a single row"])
def test_odd_activations_give_finite_layers(precision: Precision, kind: str):
    rows = rows_with_outliers()
    match kind:
        case "all zero":
            rows = torch.zeros_like(rows)
        case "dead channels":
            rows[:, 10:20] = 0
        case "one exploding channel":
            rows[:, 5] *= 1e4
        case _:
            rows = rows[:1]
    for solution in solved(precision, rows=rows).w4a4:
        for name in ("smooth", "down", "up", "scales"):
            assert torch.isfinite(getattr(solution, name).float()).all(), name
        assert (solution.smooth > 0).all()
        assert torch.isfinite(output_of(solution)(rows_with_outliers().float())).all()


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda p: p.name)
def test_a_zero_weight_solves_to_zero(precision: Precision):
    zero = {name: LinearWeights(torch.zeros(N, K), None) for name in NAMES}
    result = solve_input(
        SHARED,
        plans(precision),
        zero,
        stats_of(rows_with_outliers()),
        SolveSettings("grid", 0, torch.bfloat16),
    )
    assert all(not output_of(solution)(rows_with_outliers().float()).any() for solution in result.w4a4)


def test_the_low_rank_split_finds_a_low_rank_matrix():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    up, down = split_low_rank(weight, rank=16, seed=0)
    # float32 arithmetic on numbers of size 3: relative error of a few 1e-6
    assert float((up @ down - weight).norm() / weight.norm()) < 1e-5


def test_the_randomized_split_is_as_good_as_the_full_svd():
    weight = torch.randn(512, 384, generator=torch.Generator().manual_seed(4))
    up, down = split_low_rank(weight, rank=32, seed=0)
    best = torch.linalg.svdvals(weight)[32:].square().sum().sqrt()
    # Gaussian noise has the flattest spectrum there is, the hardest case: within 1 % of the optimum
    assert float((weight - up @ down).norm()) < 1.01 * float(best)


def test_several_weights_are_split_as_the_one_that_they_make_up():
    generator = torch.Generator().manual_seed(4)
    # below and above what a CPU takes
    parts = [torch.randn(n, 384, generator=generator) for n in (2500, 64, 300)]
    smooth = torch.rand(384, generator=generator) + 0.5
    up, down = split_low_rank(parts, rank=32, seed=0, smooth=smooth)
    whole_up, whole_down = split_low_rank(torch.cat(parts) * smooth, rank=32, seed=0)
    # the same products, added up in another order
    assert torch.allclose(up @ down, whole_up @ whole_down, atol=1e-4)
    assert up.shape == (2864, 32)


def test_several_small_weights_have_an_exact_svd_together():
    parts = [torch.randn(20, 24, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    smooth = torch.linspace(0.5, 2, 24)
    up, down = split_low_rank(parts, rank=24, seed=0, smooth=smooth)
    assert torch.allclose(up @ down, torch.cat(parts) * smooth, atol=1e-4)


def test_the_relative_error_is_that_of_the_whole_comparison():
    for solution in solved(Int4()).w4a4:
        weight = weights()[solution.plan.name].weight
        assert relative_error(solution, weight) == pytest.approx(
            weight_error(solution, weight).relative, rel=1e-6
        )


def w4a16_error(weight: torch.Tensor, solution: W4A16Solution) -> torch.Tensor:
    """Of every group, (N, K/64)."""
    return (dequantize_w4a16(solution) - weight).unflatten(1, (-1, 64)).norm(dim=-1)


def test_w4a16_leaves_no_more_than_the_best_of_its_candidates_and_less_over_all():
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(256, 512, generator=generator) + torch.randn(256, 1, generator=generator)
    plan = W4A16Plan(Linear("m", 512, 256, bias=False))
    found = solve_w4a16(plan, weight, None, dtype=torch.bfloat16)
    grid, groups = AffineGrid(torch.bfloat16), weight.reshape(-1, 64)
    errors = torch.stack([grid.error(groups, each, None) for each in grid.candidates(groups)])
    best = errors.amin(0).square().sum().sqrt()
    chosen = (found.scales.reshape(-1), found.zeros.reshape(-1))
    fitted = grid.error(groups, chosen, None)
    assert bool((fitted <= errors.amin(0)).all())
    # 1.4 % on a trained model's modulations
    assert float(fitted.square().sum().sqrt()) < 0.99 * float(best)


def test_a_weight_that_lies_on_the_symmetric_grid_stays_as_it_is():
    """As one that another tool has rounded to it; with a scale that has few bits, whose multiples are exact."""
    codes = torch.randint(-7, 8, (64, 128), generator=torch.Generator().manual_seed(7)).float()
    codes[:, ::64] = 7
    weight = codes * 0.25
    plan = W4A16Plan(Linear("m", 128, 64, bias=False))
    assert torch.equal(dequantize_w4a16(solve_w4a16(plan, weight, None, dtype=torch.bfloat16)), weight)


def test_groups_of_one_number_are_exact_up_to_its_sixteen_bits():
    weight = torch.linspace(-3, 3, 64).unsqueeze(1).repeat(1, 64)
    plan = W4A16Plan(Linear("m", 64, 64, bias=False))
    found = solve_w4a16(plan, weight, None, dtype=torch.bfloat16)
    assert bool((w4a16_error(weight, found).squeeze(1) <= 8 * weight[:, 0].abs() * 2.0**-8).all())


def test_w4a16_uses_the_better_grid_of_the_two_for_every_group():
    plan = W4A16Plan(Linear("m", 128, 64, bias=False))
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 128, generator=generator)
    weight[:, 64:] += 3  # a group far from zero: the symmetric grid would waste half its codes
    error = weight_error(solve_w4a16(plan, weight, None, dtype=torch.bfloat16), weight).relative
    symmetric = torch.round(weight / (weight.reshape(64, 2, 64).abs().amax(-1) / 7).repeat_interleave(64, 1))
    symmetric *= (weight.reshape(64, 2, 64).abs().amax(-1) / 7).repeat_interleave(64, 1)
    assert error < 0.8 * float((symmetric - weight).norm() / weight.norm())
    assert (
        dequantize_w4a16(solve_w4a16(plan, torch.zeros(64, 128), None, dtype=torch.bfloat16)).abs().max() == 0
    )


def test_an_inverted_smoothing_factor_shows_in_the_weight_error():
    (solution, *_) = solved(Int4()).w4a4
    weight = weights()["q"].weight
    right = weight_error(solution, weight)
    assert right.relative < 0.15
    assert right.agreement > 0.98
    assert right.strayed_rows == 0
    assert abs(right.smooth_slope) < 0.3
    upside_down = replace(solution, smooth=(1 / solution.smooth.float()).to(torch.bfloat16))
    assert weight_error(upside_down, weight).smooth_slope == pytest.approx(-2, abs=0.3)


def test_codes_in_another_order_agree_with_nothing():
    (solution, *_) = solved(Int4()).w4a4
    shuffled = replace(solution, codes=solution.codes[:, torch.randperm(solution.codes.shape[1])])
    error = weight_error(shuffled, weights()["q"].weight)
    assert error.agreement < 0.1
    assert error.strayed_rows > 0.9


def test_a_candidates_errors_are_those_of_its_outputs():
    generator = torch.Generator().manual_seed(1)
    rows, activation, hidden = (torch.randn(40, width, generator=generator) for width in (128, 128, 16))
    weight, four_bit = torch.randn(2, 96, 128, generator=generator)
    up = torch.randn(96, 16, generator=generator)
    outputs = rows @ weight.T
    stack = Stack(("q", "k"), weight, [64, 32], outputs, [1.0, 2.0], 16)
    lost = (activation @ four_bit.T + hidden @ up.T - outputs).double().square()
    wanted = (float(lost[:, :64].sum()), float(lost[:, 64:].sum()) / 2)
    # Two orders of float32 sums of 128 products
    assert stack.errors(activation, four_bit, hidden, up) == pytest.approx(wanted, rel=1e-5)
