"""Branch and codes fitted to each other, without calibration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.low_rank import find_low_rank, split_low_rank
from svdq_cli.solve.quantizers import dequantize_weight, quantize_weight
from svdq_cli.solve.refine import Refined, refined

BOTH: tuple[Precision, ...] = (Int4(), NvFp4())


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    """Two layers of one input whose singular values fall as a trained model's do."""
    draw = torch.Generator().manual_seed(0)
    values = torch.arange(1, 257).float() ** -0.5
    stack = torch.randn(384, 256, generator=draw) * values @ torch.randn(256, 256, generator=draw) / 16
    return list(stack.split([256, 128]))


def _refined(weights: list[Tensor], precision: Precision, rounds: int, *, rank: int = 16) -> Refined:
    return refined(weights, rank=rank, seed=0, precision=precision, dtype=torch.bfloat16, rounds=rounds)


def _lost(found: Refined, weights: list[Tensor], precision: Precision) -> float:
    """The squared error of what is stored, taken anew."""
    branch = (found.up.float() @ found.down.float()).split([len(weight) for weight in weights])
    return sum(
        float((dequantize_weight(codes, precision) + part - weight).double().square().sum())
        for codes, part, weight in zip(found.codes, branch, weights, strict=True)
    )


@pytest.mark.parametrize("precision", BOTH)
def test_rounds_lower_the_error_of_what_is_stored(weights: list[Tensor], precision: Precision):
    errors = [_refined(weights, precision, rounds).error for rounds in (0, 1, 2, 3, 5, 8, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.7 * errors[0]


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_error_is_that_of_the_stored_numbers(weights: list[Tensor], precision: Precision, rounds: int):
    found = _refined(weights, precision, rounds)
    assert found.error == pytest.approx(_lost(found, weights, precision), rel=1e-5)
    assert found.up.dtype == found.down.dtype == torch.bfloat16


@pytest.mark.parametrize("anew", [False, True])
def test_smoothed_weights_are_fitted_where_they_are_rounded(weights: list[Tensor], anew: bool):
    smooth = torch.rand(256, generator=torch.Generator().manual_seed(3)) * 4 + 0.25

    def found(rounds: int) -> Refined:
        return refined(
            weights,
            rank=16,
            seed=0,
            precision=Int4(),
            dtype=torch.bfloat16,
            rounds=rounds,
            smooth=smooth,
            anew=anew,
        )

    several = found(4)
    branch = (several.up.float() @ several.down.float()).split([len(weight) for weight in weights])
    lost = sum(
        float((dequantize_weight(codes, Int4()) - (weight - part) * smooth).double().square().sum())
        for codes, part, weight in zip(several.codes, branch, weights, strict=True)
    )
    assert several.error == pytest.approx(lost, rel=1e-5)
    assert several.error < 0.8 * found(0).error


@pytest.mark.parametrize("precision", BOTH)
def test_without_rounds_it_is_the_papers_split_rounded(weights: list[Tensor], precision: Precision):
    """But for a rougher first branch, which is within a few percent of the exact one."""
    up, down = split_low_rank(weights, rank=16, seed=0)
    up, down = up.bfloat16().float(), down.bfloat16().float()
    left = torch.cat(weights) - up @ down
    rounded = [
        dequantize_weight(quantize_weight(part, precision, dtype=torch.bfloat16), precision)
        for part in left.split([256, 128])
    ]
    papers = float((torch.cat(rounded) - left).square().sum())
    assert _refined(weights, precision, 0).error == pytest.approx(papers, rel=0.05)


def test_rank_0_and_full_rank_end(weights: list[Tensor]):
    assert _refined(weights, Int4(), 4, rank=0).up.shape == (384, 0)
    assert _refined(weights, Int4(), 2, rank=256).error < 1e-3 * _refined(weights, Int4(), 2).error


def test_a_weight_of_zeros_ends_with_zeros():
    found = _refined([torch.zeros(128, 64)], NvFp4(), 4)
    assert found.error == 0
    assert not found.codes[0].codes.any()


def test_a_search_that_begins_with_a_basis_nears_the_exact_branch(weights: list[Tensor]):
    stack = torch.cat(weights)
    rough = find_low_rank(stack, rank=16, seed=0, power_iterations=0)
    found = rough
    for _ in range(6):
        found = find_low_rank(stack, rank=16, seed=0, start=found.basis)
    exact = float(torch.linalg.svdvals(stack)[16:].square().sum())
    lost = [float((stack - each.up @ each.down).square().sum()) for each in (rough, found)]
    assert lost[1] == pytest.approx(exact, rel=1e-3)
    assert lost[0] > 1.02 * exact, "which one sketch is not"
