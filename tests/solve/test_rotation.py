"""Rotated layers: the matrix, the numbers, and what the search is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdq_cli.records import LEVELS, ActivationStats, Linear, RotatedPlan, SharedInput, SolveSettings
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.solve.rebuild import rebuilt_weight, rows_of
from svdq_cli.solve.rotation import hadamard, levels_of, rotate


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_matrix_is_its_own_inverse_and_has_equal_row_sums(size: int):
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6)
    # regular: Sylvester's has a row of ones, and would pile a channel's mean on one number
    assert torch.allclose(matrix.sum(1), torch.ones(size), atol=1e-5)


def test_a_rotation_spreads_an_outlier_and_rotating_twice_gives_it_back():
    x = torch.zeros(1, 512)
    x[0, 300] = 16
    rotated = rotate(x, 256)
    assert float(rotated[0, 256:].abs().max()) == 1.0
    assert not bool(rotated[0, :256].any())
    assert torch.equal(rotate(rotated, 256), x)


@pytest.mark.parametrize(("width", "rotation"), [(3072, 256), (640, 64), (80, 16), (72, 1)])
def test_a_layer_gets_the_largest_rotation_that_divides_its_input(width: int, rotation: int):
    assert RotatedPlan.of(Linear("a", width, 8, bias=False)).rotation == rotation


def test_levels_become_8_bit_integers_as_the_runtime_rounds_them():
    codes = torch.arange(16)
    assert levels_of(codes, torch.tensor(127.0)).tolist() == [round(127 * level) for level in LEVELS]
    assert float(levels_of(codes, torch.tensor(448.0)).max()) == 127


# ------------------------------------------------------------------------------------------------- the search

NAMES = ("a", "b")


def correlated_rows(count: int, width: int) -> Tensor:
    """Rows in which few directions hold most, and one channel is 20 times the others: as in a trained model."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(width // 8, width, generator=generator)
    rows = torch.randn(count, width // 8, generator=generator) @ mixing
    rows = rows / width**0.5 + 0.3 * torch.randn(count, width, generator=generator)
    rows[:, 5] *= 20
    return rows.to(torch.bfloat16)


def solved(bits: int, steps: tuple[str, ...], *, rows: Tensor | None, width: int = 256) -> SolvedInput:
    generator = torch.Generator().manual_seed(1)
    weights = {name: LinearWeights(torch.randn(64, width, generator=generator), None) for name in NAMES}
    plans = {name: RotatedPlan.of(Linear(name, width, 64, bias=False), bits) for name in NAMES}  # pyright: ignore[reportArgumentType]
    stats = None
    if rows is not None:
        stats = ActivationStats(
            "a", rows.float().abs().amax(0), rows.float().square().mean(0), rows, len(rows)
        )
    settings = SolveSettings("grid", 0, torch.bfloat16, steps)  # pyright: ignore[reportArgumentType]
    return solve_input(SharedInput("a", NAMES, (NAMES,)), plans, weights, stats, settings)


def mean_db(found: SolvedInput) -> float:
    return sum(report.sqnr_db for report in found.reports) / len(found.reports)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_of_the_rotated_weight_is_taken_and_worth_more_than_a_decibel(bits: int):
    rows = correlated_rows(1024, 256)
    nearest, searched = (solved(bits, steps, rows=rows) for steps in ((), ("gptq", "scales")))
    assert searched.reports[0].search.steps_taken == ("gptq",)
    assert searched.reports[0].search.steps_db.keys() == {"start", "gptq"}
    assert mean_db(searched) > mean_db(nearest) + 1


def test_8_bit_activations_and_grouped_weights_are_worth_several_decibels():
    rows = correlated_rows(1024, 256)
    four, eight = (solved(bits, ("gptq", "scales"), rows=rows) for bits in (4, 8))
    assert mean_db(eight) > mean_db(four) + 6


def test_with_few_rows_the_weight_is_rounded_to_nearest_and_the_report_says_why():
    found = solved(4, ("gptq", "scales"), rows=correlated_rows(40, 256))
    assert found.reports[0].search.fallback == (
        "40 calibration rows, but 64 are needed to learn and to validate",
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [256, 320])
def test_data_free_the_weight_is_rebuilt_with_the_error_of_4_bits(bits: int, width: int):
    found = solved(bits, (), rows=None, width=width)
    # of normal numbers with the best scale of a row, 0.11; with 16 levels and a scale for each 16 numbers, 0.075
    assert all(
        report.weight_error == pytest.approx(0.11 if bits == 4 else 0.075, abs=0.015)
        for report in found.reports
    )


def test_some_rows_of_a_solution_rebuild_those_rows_of_the_weight():
    for bits in (4, 8):
        solution = solved(bits, (), rows=None).rotated[0]
        part = rows_of(solution, slice(10, 20))
        assert torch.equal(rebuilt_weight(part), rebuilt_weight(solution)[10:20])
