"""Modulation linears: W4A16, whose weights become 4 bits and whose activation stays as it is; and curves, for those
that read nothing but the timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import Int4, W4A4Plan, W4A4Solution, W4A16Plan, W4A16Solution
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


def solve_curve(
    plan: W4A4Plan, weight: Tensor, bias: Tensor | None, over_time: Tensor, *, dtype: torch.dtype
) -> W4A4Solution:
    """A layer whose input depends on the timestep alone, as nothing but a low-rank branch.

    `over_time` (T, K) float32: the input at T timesteps. Over time the outputs x W^T run along a smooth curve, which
    spans few directions V (N, R): the branch is up = V, down = V^T W, the best of its rank for these inputs. The codes
    are zero. `weight` is (N, K) float32.
    """
    rows, columns = weight.shape
    outputs = over_time @ weight.T
    # T is much less than N: its directions are found from the (T, T) products of outputs
    _, mixes = torch.linalg.eigh((outputs @ outputs.T).double())
    rank = min(plan.rank, len(outputs), rows)
    up = torch.zeros(rows, plan.rank, device=weight.device, dtype=torch.float32)
    directions = (outputs.T.double() @ mixes[:, -rank:]).flip(1)
    # orthonormal, also where a curve has fewer directions than the branch
    up[:, :rank] = torch.linalg.qr(directions)[0].float()
    precision, up = plan.precision, up.to(dtype)
    nvfp4 = not isinstance(precision, Int4)
    return W4A4Solution(
        plan=plan,
        smooth=torch.ones(columns, dtype=dtype, device=weight.device),
        down=(up.float().T @ weight).to(dtype).contiguous(),
        up=up.contiguous(),
        codes=torch.zeros(rows, columns, dtype=torch.int8, device=weight.device),
        scales=torch.ones(
            rows,
            columns // precision.group,
            dtype=torch.float8_e4m3fn if nvfp4 else dtype,
            device=weight.device,
        ),
        outer=torch.ones(1, dtype=dtype, device=weight.device) if nvfp4 else None,
        bias=None if bias is None else bias.to(dtype),
    )
