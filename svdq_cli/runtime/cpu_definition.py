"""What the CPU engine computes, in plain torch and to the bit: sums in the engine's own order. Slow.

One chain of float32 fmas for every result: the groups in order, each with its exact integer sum; then the branch, of
each pair of ranks the odd one first; then the bias. The hidden vectors are such chains over k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import GELU_SHIFT, W4A4Solution, W4A16Solution
from svdq_cli.runtime.linear import shift_in_product, w4a4_weight, w4a16_rounded_weight
from svdq_cli.solve.quantizers import quantize_activation


def quantized_rows(
    x: Tensor, solution: W4A4Solution, unsigned_from: int | None = None
) -> tuple[Tensor, Tensor]:
    """`x` (M, K) 16-bit -> codes' values (M, K) and scales (M, K/G), float32."""
    precision = solution.plan.precision
    start = x.shape[1] if unsigned_from is None else unsigned_from
    parts = []
    for columns, unsigned in ((slice(0, start), False), (slice(start, None), True)):
        if part := x[:, columns].shape[1]:
            assert part % precision.group == 0
            rows = x[:, columns] + GELU_SHIFT if unsigned else x[:, columns]
            smoothed = rows / solution.smooth[columns]
            parts.append(quantize_activation(smoothed, precision, unsigned=unsigned))
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes, 1), torch.cat(scales, 1)


def defined_linear(x: Tensor, solution: W4A4Solution, *, unsigned_from: int | None = None) -> Tensor:
    """A W4A4 layer, (M, K) -> (M, N) in its 16-bit dtype."""
    group = solution.plan.precision.group
    codes, row_scales = quantized_rows(x, solution, unsigned_from)
    weights, columns = w4a4_weight(solution), solution.scales.float()
    total = torch.zeros(x.shape[0], columns.shape[0], dtype=torch.float32)
    for index in range(columns.shape[1]):
        at = slice(index * group, (index + 1) * group)
        # Exact: the weight's codes times its scales, divided by the scales again
        values = torch.where(columns[:, index, None] == 0, 0, weights[:, at] / columns[:, index, None])
        sums = codes[:, at].double() @ values.double().T
        total = _fma(sums, row_scales[:, index, None] * columns[None, :, index], total)
    if solution.outer is not None:
        total = total * solution.outer.float()
    dtype = solution.up.dtype
    hidden = _chain(
        torch.zeros(x.shape[0], solution.down.shape[0], dtype=torch.float32), x.float(), solution.down.float()
    )
    total = _chain(total, hidden.to(dtype).float(), solution.up.float())
    bias = None if solution.bias is None else solution.bias.float()
    if unsigned_from is not None:
        groups = unsigned_from // group
        shifted = shift_in_product(weights[:, unsigned_from:], solution.smooth[unsigned_from:])
        assert columns[:, groups:].numel()
        bias = -shifted if bias is None else bias - shifted
    return (total if bias is None else total + bias).to(dtype)


def defined_w4a16(x: Tensor, solution: W4A16Solution) -> Tensor:
    """A W4A16 layer, (M, K) -> (M, N) in its 16-bit dtype."""
    weight, total = (
        w4a16_rounded_weight(solution),
        torch.zeros(x.shape[0], solution.codes.shape[0], dtype=torch.float32),
    )
    for k in range(x.shape[1]):
        total = _fma(x[:, k, None].float(), weight[None, :, k], total)
    return (total if solution.bias is None else total + solution.bias.float()).to(solution.scales.dtype)


def _chain(total: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`total` + rows . columns^T, of each pair of terms the second first."""
    for k in range(0, rows.shape[1], 2):
        for term in (k + 1, k):
            if term < rows.shape[1]:
                total = _fma(rows[:, term, None], columns[None, :, term], total)
    return total


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once, but for double rounding in 2^-29 of cases."""
    return (a.double() * b.double() + c.double()).float()


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in float64, (B, H, M, D) of the arguments of `torch.ops.svdq.cpu_attention`, and how far its results
    may be off: weights and results are rounded to 8 significant bits, by 2^-8 at most each, sums to float32."""
    scores = scale * (q.double() @ k.double().mT)
    if bias is not None:
        scores = scores + bias.double()[:, None, None]
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # a row without a key is 0
    return weights @ v.double(), 2**-7 * (weights @ v.double().abs()) + 1e-5
