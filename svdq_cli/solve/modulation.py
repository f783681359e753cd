"""W4A16: modulation linears, whose weights become 4 bits and whose activation stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import W4A16Plan, W4A16Solution
from svdq_cli.solve.rounding import AffineGrid, gptq, nearest

# Modulations see few distinct activations (one a timestep), so more is kept in hand for those they did not see.
DAMPING = 0.1


def solve_w4a16(
    plan: W4A16Plan,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> W4A16Solution:
    """`weight` (N, K) float32, on the better of two grids per (row, 64 inputs); see AffineGrid.

    With activation `rows` (M, K) it is rounded by GPTQ for what they are, without to nearest.
    """
    grid = AffineGrid(dtype, plan.group)
    found = None if rows is None else gptq(weight, rows.T @ rows / len(rows), grid, damping=DAMPING)
    found = found or nearest(weight, grid)
    scales, zeros = found.parameters
    return W4A16Solution(
        plan=plan,
        codes=found.codes,
        scales=scales,
        zeros=zeros,
        bias=None if bias is None else bias.to(dtype),
    )


def dequantize_w4a16(solution: W4A16Solution) -> Tensor:
    """(N, K) float32: codes * scales + zeros, rounded to 16 bits as the kernels' fused multiply-add does."""
    codes = solution.codes.reshape(solution.codes.shape[0], -1, solution.plan.group).float()
    exact = codes * solution.scales.float().unsqueeze(-1) + solution.zeros.float().unsqueeze(-1)
    return exact.to(solution.scales.dtype).float().reshape(solution.codes.shape)
