"""What the 4-bit model is tuned for: the error that is left when the steps of an image are added up.

Ours. A sampler adds the model's outputs of all steps, so an image suffers from the *sum* of their errors. Rounding
noise of activations changes from step to step and averages out; what stays the same (a weight that is off, a gain below
1) adds up. Squared errors of single steps can't tell the two apart: tuned on them, layers trade noise for bias, and
images get no better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]  # of the model: one tensor or several, in its own order


def signals_of(wanted: Iterable[Outputs]) -> list[float]:
    """The mean power of a call, for each of the model's outputs."""
    powers = [[float(out.float().square().sum()) for out in outputs] for outputs in wanted]
    return [max(sum(each) / len(powers), 1e-30) for each in zip(*powers, strict=True)]


def trajectory_error(errors: Sequence[Outputs], signals: Sequence[float], length: int) -> Tensor:
    """Estimates |sum of e_t|^2 / `length` over a trajectory's `length` steps from a sample of its calls, relative to
    the `signals` of one call and summed over the model's outputs.

    `errors`: what each sampled call's outputs are off by. With a the mean of |e_t|^2 and c that of <e_t, e_u> over
    pairs of different steps, that is a + (length - 1) c; both means are free of bias for a random sample. A single call
    has no pairs and gives a. A scalar."""
    total = errors[0][0].new_zeros(())
    count = len(errors)
    for parts, signal in zip(zip(*errors, strict=True), signals, strict=True):
        stacked = torch.stack(parts)
        alone = stacked.square().sum() / count
        total = total + alone / signal
        if count > 1:
            pairs = (stacked.sum(0).square().sum() - count * alone) / (count * (count - 1))
            total = total + (length - 1) * pairs / signal
    return total
