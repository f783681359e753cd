"""Learned smoothing: log s per channel by gradient descent through both quantizers.

Ours, beyond the paper; same file, same runtime. The quantizers' rounding passes the gradient straight through, their
scales are differentiated (as in LSQ, arXiv 1902.08153): it is through the scales that s acts, since x/s and W·s cancel
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.quantizers import E4M3_MAX, E4M3_TINY, round_e2m1_to_even
from svdq_cli.system.threads import end_if_left

# Five times as many numbers a step, or twice the steps, change the result by less than 0.05 dB.
STEPS = 60
LEARNING_RATE = 0.06
ROWS_PER_STEP = 192
# rows of W: the loss is a mean over outputs, so a sample of them has the same gradient in mean
OUTPUTS_PER_STEP = 192
BRANCH_EVERY = 30  # steps between two fresh low-rank branches
# share of the amplitude of rounding to nearest that GPTQ leaves; 0.2 to 0.6 end within 0.03 dB
GPTQ_LEAVES = 0.5
_TINY = 1e-12


def learn_smoothing(
    start: Tensor,
    weight: Tensor,
    rows: Tensor,
    precision: Precision,
    *,
    branch: Callable[[Tensor], Tensor],
    weight_noise: float,
    seed: int,
) -> Tensor:
    """s (K,) float32, started from `start`, for the stacked `weight` (N, K) and activation `rows` (M, K).

    `branch(s)` gives the low-rank product U·D (N, K) in unsmoothed coordinates. Rows of `weight` weigh as they are, so
    the caller scales each layer to the weight it shall have. `weight_noise`: the share of the weights' rounding error
    that counts, below 1 where a better rounding follows; smoothing then leaves more of the difficulty to the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    log_s = start.log()
    optimizer = torch.optim.Adam([log_s], lr=LEARNING_RATE)
    missing = weight - branch(start)
    for step in range(STEPS):
        end_if_left()
        if step and step % BRANCH_EVERY == 0:
            missing = weight - branch(log_s.exp())
        for group in optimizer.param_groups:  # decay to a tenth: late steps only settle
            group["lr"] = LEARNING_RATE * (1 - 0.9 * step / STEPS)
        x = _sample(rows, ROWS_PER_STEP, generator)
        v = _sample(missing, OUTPUTS_PER_STEP, generator)
        log_s.grad = _gradient(x, v, log_s.exp(), precision, weight_noise)
        optimizer.step()
    learned = log_s.exp()
    return learned if bool(torch.isfinite(learned).all()) else start


def _gradient(x: Tensor, v: Tensor, s: Tensor, precision: Precision, weight_noise: float) -> Tensor:
    """By log s (K,): of the mean square of what rounding loses of x v^T, for rows `x` (M, K) and weights `v` (N, K).
    By hand: what autograd would keep and go through is twice the work of a step."""
    inputs, weights = x / s, v * s
    rounded_inputs, input_peaks = _fake_quantize(inputs, precision, weight=False)
    rounded_weights, weight_peaks = _fake_quantize(weights, precision, weight=True)
    counted = torch.lerp(weights, rounded_weights, weight_noise)
    lost = torch.addmm(x @ v.T, rounded_inputs, counted.T, beta=-1).mul_(2 / (len(x) * len(v)))
    by_weights = _by_log(weights, rounded_weights, weight_peaks, lost.T @ rounded_inputs, weight_noise)
    return by_weights - _by_log(inputs, rounded_inputs, input_peaks, lost @ counted, 1.0)


def _by_log(exact: Tensor, rounded: Tensor, peaks: Tensor, upstream: Tensor, noise: float) -> Tensor:
    """The gradient by the logarithm of a factor of each column, (K,), from that by the rounded matrix, `upstream`
    (M, K). Rounding passes it through; a group's scale, and so all that its rounding loses, grows with the factor of
    its peak. `peaks`: that one's column, by row and group."""
    lost = (rounded - exact).mul_(upstream).reshape(*peaks.shape, -1).sum(-1).mul_(noise)
    gradient = (upstream * exact).sum(0)
    return gradient.scatter_add_(0, peaks.flatten(), lost.flatten())


def _sample(matrix: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if matrix.shape[0] <= count:
        return matrix
    return matrix[torch.randperm(matrix.shape[0], generator=generator)[:count].to(matrix.device)]


def _fake_quantize(x: Tensor, precision: Precision, *, weight: bool) -> tuple[Tensor, Tensor]:
    """`x` (M, K) rounded, and the column of the largest number of each group, (M, K/G)."""
    groups = x.reshape(x.shape[0], -1, precision.group)
    peak, place = groups.abs().max(-1, keepdim=True)
    peak.clamp_(min=_TINY)
    match precision:
        case Int4():
            scale = peak / 7
            rounded = (groups / scale).round_()
        case NvFp4():
            # A weight's micro scale is relative to its outer scale, which leaves e4m3's relative precision as it is.
            scale = peak / 6
            if not weight:
                scale = scale.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).float()
            rounded = round_e2m1_to_even(groups / scale)
    first = torch.arange(0, x.shape[1], precision.group, device=x.device)
    return rounded.mul_(scale).reshape(x.shape), place.squeeze(-1) + first
