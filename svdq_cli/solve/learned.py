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
ROWS_PER_STEP = 256
# rows of W: the loss is a mean over outputs, so a sample of them has the same gradient in mean
OUTPUTS_PER_STEP = 256
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
    log_s = start.log().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([log_s], lr=LEARNING_RATE)
    missing = weight - branch(start)
    for step in range(STEPS):
        end_if_left()
        if step and step % BRANCH_EVERY == 0:
            with torch.no_grad():
                missing = weight - branch(log_s.detach().exp())
        for group in optimizer.param_groups:  # decay to a tenth: late steps only settle
            group["lr"] = LEARNING_RATE * (1 - 0.9 * step / STEPS)
        x = _sample(rows, ROWS_PER_STEP, generator)
        v = _sample(missing, OUTPUTS_PER_STEP, generator)
        s = log_s.exp()
        exact = v * s
        rounded = torch.lerp(exact, _fake_quantize(exact, precision, weight=True), weight_noise)
        output = _fake_quantize(x / s, precision, weight=False) @ rounded.T
        loss = (output - x @ v.T).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    learned = log_s.detach().exp()
    return learned if bool(torch.isfinite(learned).all()) else start


def _sample(matrix: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if matrix.shape[0] <= count:
        return matrix
    return matrix[torch.randperm(matrix.shape[0], generator=generator)[:count].to(matrix.device)]


def _fake_quantize(x: Tensor, precision: Precision, *, weight: bool) -> Tensor:
    groups = x.reshape(x.shape[0], -1, precision.group)
    peak = groups.abs().amax(-1, keepdim=True).clamp(min=_TINY)
    match precision:
        case Int4():
            scale = peak / 7
            rounded = _straight_through(groups / scale, torch.round)
        case NvFp4():
            # A weight's micro scale is relative to its outer scale, which leaves e4m3's relative precision as it is.
            scale = peak / 6
            if not weight:
                scale = _straight_through(
                    scale, lambda s: s.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).float()
                )
            rounded = _straight_through(groups / scale, round_e2m1_to_even)
    return (rounded * scale).reshape(x.shape)


def _straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    return x + (rounding(x) - x).detach()
