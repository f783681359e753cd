"""The means of inputs, and statistics of what is left when they are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.records import ActivationStats

# Of an input's power: below it a mean is worth no change of biases
LEAST_SHARE = 0.01
_TINY = 1e-30


def common_mean(inputs: Sequence[ActivationStats], width: int) -> Tensor | None:
    """The mean (width,) of inputs' first channels, exact in bfloat16, all inputs weighing the same; None where it has
    next to nothing of their power."""
    rows = [stats.rows[:, :width].double() for stats in inputs]
    mean = torch.stack([each.mean(0) for each in rows]).mean(0).to(torch.bfloat16).double()
    power = torch.stack([each.square().mean(0) for each in rows]).mean(0).sum()
    left = torch.stack([(each - mean).square().mean(0) for each in rows]).mean(0).sum()
    if float(power - left) < LEAST_SHARE * float(power) or not bool(torch.isfinite(mean).all()):
        return None
    return mean.float()


def less_mean(stats: ActivationStats, mean: Tensor) -> ActivationStats:
    """Statistics of x - `mean` (K,). What the largest number of a channel becomes is told by the rows."""
    before = stats.rows.float()
    after = (before - mean).to(stats.rows.dtype)
    # Rows are a sample: the largest of all tokens was so much larger than the largest of them.
    beyond = (stats.abs_max / before.abs().amax(0).clamp(min=_TINY)).clamp(min=1.0)
    peaks = torch.where(mean == 0, stats.abs_max, after.float().abs().amax(0) * beyond)
    covariance = stats.covariance
    moment = stats.second_moment - 2 * mean * before.double().mean(0).float() + mean.square()
    return replace(
        stats,
        rows=after,
        abs_max=peaks,
        second_moment=torch.where(mean == 0, stats.second_moment, moment.clamp(min=0)),
        mean=mean,
        covariance=None if covariance is None else replace(covariance, mean=covariance.mean - mean),
    )
