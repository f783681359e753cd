"""The covariance of a layer's input as it is stored, in a quarter of the bytes of the matrix, and the matrix again.

Half of it, as the other half is the same; as correlations, which are between -1 and 1, in float16. That moves them by
at most 2^-12, less than another sample of tokens would; bfloat16 would move them eight times as far. The mean is kept
apart, so that it can be moved out of an input afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import InputCovariance

BLOCK = 512  # rows and columns that are looked at together


def stored_covariance(mean: Tensor, covariance: Tensor, tokens: int) -> InputCovariance:
    """`mean` (K,) and `covariance` (K, K) float32, of which what is above the diagonal counts. On the CPU."""
    width = len(mean)
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(deviation > 0, 1 / deviation, torch.zeros_like(deviation))
    correlations = torch.empty(width * (width - 1) // 2, dtype=torch.float16)
    start = 0
    for row in range(width - 1):
        right = covariance[row, row + 1 :] * (scale[row] * scale[row + 1 :])
        correlations[start : start + len(right)] = right.clamp_(-1, 1)
        start += len(right)
    return InputCovariance(mean, deviation, correlations, tokens)


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


def covariance_bytes(width: int) -> int:
    """What the covariance of `width` channels takes, in memory and on the disk."""
    return width * (width - 1) + 8 * width
