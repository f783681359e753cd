"""Second moments of an input from its covariance as calibration stores it."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import InputCovariance

BLOCK = 512  # rows and columns that are looked at together


def moments_of(covariance: InputCovariance, factor: Tensor, *, trusted: float = 1.0) -> Tensor:
    """E[y yᵀ] (K, K) float32 of y = x * `factor` (K,), on the device of `factor`. `trusted`: the share
    of its correlations that is taken over."""
    width = len(factor)
    deviation, mean = (
        covariance.deviation.to(factor.device) * factor,
        covariance.mean.to(factor.device) * factor,
    )
    packed = covariance.correlations.to(factor.device)
    moments = torch.empty(width, width, dtype=torch.float32, device=factor.device)
    start = 0
    for row in range(width):
        count = width - row - 1
        torch.mul(packed[start : start + count], trusted * deviation[row + 1 :], out=moments[row, row + 1 :])
        start += count
    for first in range(0, width, BLOCK):
        part = slice(first, first + BLOCK)
        moments[part, first:].mul_(deviation[part].unsqueeze(1))
        corner = moments[part, part].triu_(1)
        corner.add_(corner.T.clone())
        moments[first + BLOCK :, part] = moments[part, first + BLOCK :].T
    moments.diagonal().copy_(deviation.square())
    return moments.addr_(mean, mean)


def trust(covariance: InputCovariance) -> float:
    """The share, 0 to 1, of what the correlations say that is not chance, in squares: channels that have nothing to do
    with each other show correlations of 1/T in the mean square, in a sample of T tokens."""
    pairs = len(covariance.correlations)
    total = sum(float(part.float().square_().sum()) for part in covariance.correlations.split(BLOCK**2))
    return max(0.0, 1 - pairs / covariance.tokens / total) if total else 0.0
