"""Second moments of an input from its covariance as calibration stores it."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import InputCovariance

BLOCK = 512  # rows and columns that are looked at together


def moments_of(covariance: InputCovariance, factor: Tensor) -> Tensor:
    """E[y yᵀ] (K, K) float32 of y = x * `factor` (K,), on the device of `factor`."""
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
        torch.mul(packed[start : start + count], deviation[row + 1 :], out=moments[row, row + 1 :])
        start += count
    for first in range(0, width, BLOCK):
        part = slice(first, first + BLOCK)
        moments[part, first:].mul_(deviation[part].unsqueeze(1))
        corner = moments[part, part].triu_(1)
        corner.add_(corner.T.clone())
        moments[first + BLOCK :, part] = moments[part, first + BLOCK :].T
    moments.diagonal().copy_(deviation.square())
    return moments.addr_(mean, mean)
