"""A low-rank branch and the codes next to it, each fitted in turn to what the other leaves of the weight.

The paper takes the branch from the weight alone (SVDQuant, arXiv 2411.05007, section 4.2): what rounding then loses has
large directions of its own, which the same rank can hold. Taking the branch again from W - dequant(Q), and Q again from
W - U D, is in LoftQ (arXiv 2310.08659). Ours: the branch goes further than that, first by more and at last not at all
(RELAX), which takes a third of the rounds, and each SVD begins where the last one ended. Calibrated layers do this in
smoothed coordinates, before GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.low_rank import find_low_rank
from svdq_cli.solve.quantizers import (
    NVFP4_SHARES,
    QuantizedWeight,
    empty_quantized,
    quantize_rows,
    row_blocks,
)
from svdq_cli.solve.rebuild import Residual
from svdq_cli.solve.work import NVFP4_ROUNDING, Shapes, Work, split_work

ROUNDS = 5
# The branch is asked to take over all of the rounding error, and this share of it besides for each round that is still
# to come after its own. Far at first leads out of the nearest dead end; the last branch is the one that stays.
RELAX = 3 / 8
MOST_RELAX = 2.0  # of many rounds, the first
LEAST_GAIN = 0.01  # a round that takes less off the error skips half of those that were to come
# The first branch need not be exact, and those that follow begin with its basis.
POWER_ITERATIONS = 1
# Where inputs are quantized too, their noise grows with what the branch leaves to the codes: these SVDs are finer.
ANEW_POWER_ITERATIONS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    """One branch of a layer, or of layers that share its `down`, with the codes of each layer."""

    up: Tensor  # (sum of N, R), 16-bit
    down: Tensor  # (R, K), 16-bit
    codes: tuple[QuantizedWeight, ...]
    error: float  # sum of squares of what is lost of the weights


def refined(
    weights: Sequence[Tensor],
    *,
    rank: int,
    seed: int,
    precision: Precision,
    dtype: torch.dtype,
    rounds: int = ROUNDS,
    smooth: Tensor | None = None,
    anew: bool = False,
) -> Refined:
    """Branch and codes of `weights` (N_i, K) float32 that share one `down`.

    `smooth` (K,): the codes are those of weights whose columns are multiplied by it, and it is there that the error is
    taken; None for a factor of 1. `down` is applied to what is not smoothed. Stored numbers are rounded to `dtype`
    before the error is taken. The best of at most `rounds` refinements after the first. `anew`: no SVD begins where the
    last one ended, which takes longer and leaves less to the codes.
    """
    # In 16 bits, which is finer than 4-bit codes by far and half the memory
    targets = [weight.new_empty(weight.shape, dtype=torch.bfloat16) for weight in weights if rounds and rank]
    start: Tensor | None = None
    best: Refined | None = None
    step = min(RELAX, MOST_RELAX / max(1, rounds - 1))
    left = rounds if rank else 0
    while True:
        found = find_low_rank(
            weights if best is None else targets,
            rank=rank,
            seed=seed,
            power_iterations=ANEW_POWER_ITERATIONS if anew else POWER_ITERATIONS,
            start=None if anew else start,
            smooth=smooth if best is None else None,  # which targets are multiplied by already
        )
        start, up = found.basis, found.up.to(dtype)
        down = (found.down if smooth is None else found.down / smooth).to(dtype)
        del found
        made = _rounded(
            weights,
            up,
            down,
            precision,
            dtype,
            smooth=smooth,
            targets=targets if left else (),
            beyond=step * (left - 1),
        )
        gain = 1.0 if best is None else 1 - made.error / max(best.error, 1e-30)
        if best is None or gain > 0:
            best = made
        del made
        if not left:
            return best
        left = left - 1 if gain >= LEAST_GAIN else left // 2


def _rounded(
    weights: Sequence[Tensor],
    up: Tensor,
    down: Tensor,
    precision: Precision,
    dtype: torch.dtype,
    *,
    smooth: Tensor | None,
    targets: Sequence[Tensor],
    beyond: float,
) -> Refined:
    """What a branch leaves over, rounded. `targets` get what the next branch is to be near to: the smoothed weights
    less their codes, and `beyond` times what rounding lost besides."""
    made: list[QuantizedWeight] = []
    error = torch.zeros((), dtype=torch.float64, device=down.device)
    parts = up.split([len(weight) for weight in weights])
    for index, (weight, rows_up) in enumerate(zip(weights, parts, strict=True)):
        residual = Residual(weight, rows_up.float(), down.float(), smooth)
        quantized = empty_quantized(residual, precision, dtype=dtype)
        for rows in row_blocks(weight):
            left = residual[rows]
            four_bit = quantize_rows(left, quantized, rows, precision)
            lost = left.sub_(four_bit)
            error += torch.linalg.vector_norm(lost, dim=1).double().square().sum()
            if targets:
                whole = weight[rows] if smooth is None else weight[rows] * smooth
                targets[index][rows] = torch.sub(whole, four_bit, out=four_bit).add_(lost, alpha=beyond)
        made.append(quantized)
    return Refined(up, down, tuple(made), float(error))


def round_work(shapes: Shapes, width: int, precision: Precision, *, anew: bool = False) -> Work:
    """What one round takes, of branches of these shapes."""
    size = width * sum(count for count, _ in shapes)
    nearest = size * (NVFP4_ROUNDING * len(NVFP4_SHARES) if isinstance(precision, NvFp4) else 1)
    # two products, rounding, and a look at what was lost, which is half of what a comparison does
    return split_work(shapes, width, ANEW_POWER_ITERATIONS if anew else 0) + Work(
        quantized=nearest, compared=size / 2, calls=200
    )


def held_bytes(precision: Precision, branch: int, k: int, columns: int, at_once: int) -> int:
    """Memory of the rounds besides the weights: the branch is found next to the codes of the best round, in 16-bit
    weights; then these are rounded next to them. `branch`: N of the largest branch; `columns`: of the basis that it is
    found in; `at_once`: numbers that are rounded at a time."""
    factors = 4 * columns * (branch + k)
    scales = 2 * branch * k * (2 if isinstance(precision, Int4) else 1) // precision.group
    rounding = at_once * (13 if isinstance(precision, Int4) else 21)
    rounded = branch * k + 2 * factors + 4 * columns * branch + scales + rounding
    return 2 * branch * k + max(3 * factors, rounded)
