"""W4A16: modulation linears, whose weights become 4 bits and whose activation stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import W4A16Plan, W4A16Solution


def solve_w4a16(plan: W4A16Plan, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> W4A16Solution:
    """Round to nearest, per (row, 64 inputs). `weight` (N, K) float32.

    Each group takes the better of two grids: symmetric around zero with 15 levels (scale = absmax / 7, the usual
    export), or all 16 levels from its minimum to its maximum. The file form is the same.
    """
    groups = weight.reshape(weight.shape[0], -1, plan.group)
    low, high = groups.amin(-1), groups.amax(-1)
    candidates = []
    for scale, zero in (
        (groups.abs().amax(-1) / 7, None),
        ((high - low) / 15, low),
    ):
        scale = scale.to(dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = (-7 * scale if zero is None else zero).to(dtype)
        codes = torch.round((groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)).clamp(0, 15)
        candidates.append((scale, zero, codes, (_values(codes, scale, zero) - groups).square().sum(-1)))
    (scale_a, zero_a, codes_a, error_a), (scale_b, zero_b, codes_b, error_b) = candidates
    second = error_b < error_a
    return W4A16Solution(
        plan=plan,
        codes=torch.where(second.unsqueeze(-1), codes_b, codes_a).reshape(weight.shape).to(torch.uint8),
        scales=torch.where(second, scale_b, scale_a),
        zeros=torch.where(second, zero_b, zero_a),
        bias=None if bias is None else bias.to(dtype),
    )


def dequantize_w4a16(solution: W4A16Solution) -> Tensor:
    """(N, K) float32: codes * scales + zeros, rounded to 16 bits as the kernels' fused multiply-add does."""
    codes = solution.codes.reshape(solution.codes.shape[0], -1, solution.plan.group).float()
    return _values(codes, solution.scales, solution.zeros).reshape(solution.codes.shape)


def _values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    exact = codes * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    return exact.to(scale.dtype).float()
