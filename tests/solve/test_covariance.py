"""What GPTQ makes of the covariance of many tokens where rows are few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from svdq_cli.calibration.covariance import covariance_bytes, stored_covariance
from svdq_cli.records import (
    ActivationStats,
    Int4,
    Linear,
    NvFp4,
    Precision,
    RotatedPlan,
    SharedInput,
    SolveSettings,
    W4A4Plan,
)
from svdq_cli.solve.covariance import moments_of, trust
from svdq_cli.solve.forward import LinearWeights, output_sqnr_db
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.solve.means import less_mean
from svdq_cli.solve.quantizers import fake_quantize_activation
from svdq_cli.solve.second_moments import quantized_moments, second_moments

K, N = 512, 256


def inputs(rows: int, seed: int) -> Tensor:
    """Directions whose power falls off as in a transformer, one channel in 64 larger, and a mean."""
    power = torch.arange(1, K + 1).float().rsqrt()
    directions, _ = torch.linalg.qr(torch.randn(K, K, generator=torch.Generator().manual_seed(5)))
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)) * power @ directions
    x[:, ::64] *= 12
    return x + 0.2 * torch.sin(torch.arange(K))


def stats_of(x: Tensor, *, rows: int) -> ActivationStats:
    covariance = stored_covariance(x.mean(0), torch.cov(x.T, correction=0), len(x))
    return ActivationStats(
        "l", x.abs().amax(0), x.square().mean(0), x[:rows].bfloat16(), len(x), covariance=covariance
    )


@pytest.fixture(scope="module")
def known() -> ActivationStats:
    return stats_of(inputs(8 * K, 0), rows=K // 2)


def test_correlations_are_trusted_as_far_as_they_are_not_chance():
    white = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(0))
    known = [stats_of(x, rows=1).covariance for x in (white, inputs(2 * K, 0), inputs(16 * K, 0))]
    chance, few, many = (trust(each) for each in known if each is not None)
    assert chance < 0.02
    assert 0.9 < few < many < 1


def test_the_stored_half_is_the_whole_to_a_thousandth():
    x, factor = inputs(4000, 0), torch.linspace(0.5, 2, K)
    stored = stats_of(x, rows=1).covariance
    assert stored is not None
    assert stored.bytes == covariance_bytes(K) < 4 * K * K / 3.9
    found, exact = moments_of(stored, factor), (x * factor).T @ (x * factor) / len(x)
    sizes = exact.diagonal().sqrt()
    assert float(((found - exact) / sizes / sizes.unsqueeze(1)).abs().max()) < 1e-3
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_a_channel_that_never_moves_is_none_of_the_others_business():
    x = inputs(300, 0)
    x[:, 7] = 3.0
    stored = stats_of(x, rows=1).covariance
    assert stored is not None
    found = moments_of(stored, torch.ones(K))
    torch.testing.assert_close(found[7], 3 * x.mean(0), rtol=1e-4, atol=1e-4)


def test_a_mean_that_was_moved_out_is_out_of_the_covariance_too(known: ActivationStats):
    x, mean = inputs(8 * K, 0), (0.2 * torch.sin(torch.arange(K))).bfloat16().float()
    left = less_mean(known, mean).covariance
    assert left is not None
    exact = (x - mean).T @ (x - mean) / len(x)
    torch.testing.assert_close(moments_of(left, torch.ones(K)), exact, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=["int4", "nvfp4"])
def test_the_moments_of_quantized_inputs_are_nearer_than_those_of_few_rows(
    known: ActivationStats, precision: Precision
):
    x, smooth = inputs(8 * K, 0), known.abs_max.sqrt()
    quantized = fake_quantize_activation(x / smooth, precision)
    exact = quantized.T @ quantized / len(quantized)
    rows = known.rows.float() / smooth
    few = fake_quantize_activation(rows, precision)
    assert known.covariance is not None
    found = quantized_moments(moments_of(known.covariance, 1 / smooth), rows, few)
    assert float((found - exact).norm()) < 0.3 * float((second_moments(few) - exact).norm())


def solved(stats: ActivationStats, plan: W4A4Plan | RotatedPlan) -> tuple[SolvedInput, float]:
    """The layer, and its SQNR on rows that nothing has seen."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * K**-0.5
    found = solve_input(
        SharedInput("l", ("l",), (("l",),)),
        {"l": plan},
        {"l": LinearWeights(weight, None)},
        stats,
        SolveSettings("closed-form", 0, torch.bfloat16, ("gptq", "scales")),
    )
    return found, output_sqnr_db(inputs(2048, 7), weight, found.solutions[0])


LINEAR = Linear("l", K, N, bias=False)


@pytest.mark.parametrize(
    "plan",
    [W4A4Plan(LINEAR, Int4(), 16), W4A4Plan(LINEAR, NvFp4(), 16), RotatedPlan.of(LINEAR, 4)],
    ids=["int4", "nvfp4", "rotated"],
)
def test_with_half_as_many_rows_as_channels_gptq_gains_from_the_covariance(
    known: ActivationStats, plan: W4A4Plan | RotatedPlan
):
    alone, without = solved(replace(known, covariance=None), plan)
    informed, within = solved(known, plan)
    assert within > without + 0.1
    assert alone.reports[0].search.covariance_tokens == 0
    assert informed.reports[0].search.covariance_tokens == 8 * K
