"""Layers of random numbers, the same at every call, on which engine and kernels prove themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.records import Linear, Precision, W4A4Plan, W4A4Solution, W4A16Plan, W4A16Solution
from svdq_cli.runtime.naive import naive_solution

RANK = 32


def sample_w4a4(precision: Precision, dtype: torch.dtype, *, k: int, n: int) -> W4A4Solution:
    """A layer (N, K) of rank RANK."""
    plan = W4A4Plan(Linear("self-test", k, n, bias=True), precision, RANK)
    naive = naive_solution(plan, draw(1, n, k) / k**0.5, draw(2, n), dtype)
    return replace(
        naive,
        plan=plan,
        smooth=(draw(3, k).abs() + 0.5).to(dtype),
        down=(draw(4, RANK, k) / k**0.5).to(dtype),
        up=(draw(5, n, RANK) / 8).to(dtype),
    )


def sample_w4a16(dtype: torch.dtype, *, k: int, n: int) -> W4A16Solution:
    """A modulation layer (N, K)."""
    plan = W4A16Plan(Linear("self-test", k, n, bias=True))
    scales = (draw(6, n, k // 64).abs() / 100).to(dtype)
    codes = torch.arange(n * k).reshape(n, k).remainder(13).to(torch.uint8)
    return W4A16Solution(plan, codes, scales, -7 * scales, draw(7, n).to(dtype))


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, float32, always the same for a seed. Of any shape, `shape`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
