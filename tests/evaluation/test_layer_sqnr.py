"""Signal to quantization noise of one converted layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from svdq_cli.errors import CheckFailedError
from svdq_cli.evaluation.layers import SQNR_CAP_DB, layer_sqnr_db
from svdq_cli.records import Int4, Linear, NvFp4, W4A4Plan, W4A16Plan, W4A16Solution
from svdq_cli.runtime.linear import w4a4_exact, w4a16_weight
from svdq_cli.runtime.naive import naive_solution

K, N = 128, 192


def small_layer(precision=None):
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(N, K, generator=draw) / K**0.5, torch.randn(N, generator=draw) / 10
    rows = torch.randn(100, K, generator=draw).bfloat16()
    plan = W4A4Plan(Linear("block.proj", K, N, bias=True), precision or Int4(), rank=0)
    return weight, bias, naive_solution(plan, weight, bias, torch.bfloat16), rows


def w4a16(*, zeros: float = -0.07) -> W4A16Solution:
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    scales = torch.full((N, K // 64), 2.0**-7, dtype=torch.bfloat16)
    plan = W4A16Plan(Linear("block.mod", K, N, bias=False))
    return W4A16Solution(plan, codes, scales, torch.full_like(scales, zeros), None)


def test_it_is_the_ratio_of_the_two_energies():
    weight, bias, solution, rows = small_layer()
    y = rows.double() @ weight.double().T + bias.double()
    noise = y - w4a4_exact(rows, solution).double()
    wanted = 10 * torch.log10(y.square().sum() / noise.square().sum()).item()
    # The exact output is made in float32 (1e-7 relative) and its noise is about 10 %: 1e-5 of the noise.
    assert layer_sqnr_db(weight, bias, solution, rows) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=["int4", "nvfp4"])
def test_four_bits_of_gaussian_data_are_near_17_db(precision):
    # Weight and activation each carry about 10 % of noise: 10 log10(1 / 0.02) = 17 dB, and 2 dB of tolerance.
    assert layer_sqnr_db(*small_layer(precision)) == pytest.approx(17, abs=2)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_chunks_do_not_change_the_figure(chunk):
    layer = small_layer()
    # Another batch size may sum a GEMM in another order: 1e-6 of the noise at most.
    assert layer_sqnr_db(*layer, chunk=chunk) == pytest.approx(layer_sqnr_db(*layer), abs=1e-4)


def test_a_weight_only_solution_of_its_own_weight_is_off_by_the_rounding_of_16_bits():
    solution = w4a16()
    rows = torch.randn(20, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    # weight and result are rounded to 8 bits of significand: 2^-9 / sqrt(3) of a number is 59 dB, twice that 56
    assert 54 < layer_sqnr_db(w4a16_weight(solution), None, solution, rows) < 60


def test_a_layer_without_signal_is_bounded_below():
    rows = torch.ones(4, K, dtype=torch.bfloat16)
    assert layer_sqnr_db(torch.zeros(N, K), None, w4a16(), rows) == -SQNR_CAP_DB


def test_numbers_that_are_not_finite_are_refused_and_the_layer_named():
    weight, bias, solution, rows = small_layer()
    broken = replace(solution, scales=solution.scales.clone().fill_(float("nan")))
    with pytest.raises(CheckFailedError, match=r"converted layer block\.proj"):
        layer_sqnr_db(weight, bias, broken, rows)
    weight[3, 3] = float("inf")
    with pytest.raises(CheckFailedError, match=r"16-bit layer block\.proj"):
        layer_sqnr_db(weight, bias, solution, rows)
