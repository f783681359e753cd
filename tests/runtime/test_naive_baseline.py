"""The naive baseline: 4 bits, no smoothing, no branch."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.records import Int4, Linear, NvFp4, W4A4Plan
from svdq_cli.runtime.linear import w4a4_exact, w4a4_forward
from svdq_cli.runtime.naive import naive_solution

PRECISIONS = [pytest.param(Int4(), id="int4"), pytest.param(NvFp4(), id="nvfp4")]


def layer(precision, *, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(128, 256, generator=draw) / 16, torch.randn(128, generator=draw)
    plan = W4A4Plan(Linear("layer", 256, 128, bias=True), precision, rank=32)
    return weight, bias, naive_solution(plan, weight, bias, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_naive_solution_has_no_smoothing_and_no_branch(precision):
    _, bias, solution = layer(precision)
    assert solution.plan.rank == 0
    assert solution.smooth.eq(1).all()
    assert solution.smooth.shape == (256,)
    assert solution.down.shape == (0, 256)
    assert solution.up.shape == (128, 0)
    assert solution.bias is not None
    assert torch.equal(solution.bias, bias.bfloat16())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_stored_16_bit_tensor_has_the_asked_dtype(precision, dtype):
    _, _, solution = layer(precision, dtype=dtype)
    stored = (solution.smooth, solution.down, solution.up, solution.bias)
    assert {t.dtype for t in stored if t is not None} == {dtype}


@pytest.mark.parametrize(("precision", "worst"), [(Int4(), 0.16), (NvFp4(), 0.16)], ids=["int4", "nvfp4"])
def test_normal_data_is_reproduced_as_well_as_four_bits_allow(precision, worst):
    weight, bias, solution = layer(precision)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = x.float() @ weight.T + bias
    # Gaussian weights and activations each lose about 10 %: about 14 % together.
    assert (w4a4_exact(x, solution) - wanted).norm() / (wanted - bias).norm() < worst
    assert w4a4_forward(x, solution).isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_outlier_channel_ruins_the_naive_product(precision):
    """What smoothing and the branch are for; if this passes unharmed, the baseline is no baseline."""
    weight, bias, solution = layer(precision)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 50
    weight = weight.clone()
    weight[:, 3] = 0  # the large channel carries nothing, it only makes its neighbors coarse
    solution = naive_solution(solution.plan, weight, bias, torch.bfloat16)
    wanted = x.bfloat16().float() @ weight.T
    error = (w4a4_exact(x, solution) - bias.bfloat16().float() - wanted).norm() / wanted.norm()
    # The channel's own group is lost: one group of 4 for int4, one of 16 for nvfp4.
    assert error > (0.3 if isinstance(precision, Int4) else 0.2)
