"""The covariance of an input over more tokens than rows are kept of it.

A step of the search that solves with second moments fits chance where rows are about as many as channels, or fewer. The
covariance needs no rows: each batch of images keeps more tokens for it, spread as the rows are, which are added up when
all batches are there, in the order of the images, and let go. Images whose rows judge the steps are left out.

It is stored in a quarter of the bytes of the matrix: half of it, as the other half is the same; as correlations, which
are between -1 and 1, in float16. That moves them by at most 2^-12, less than another sample of tokens would; bfloat16
would move them eight times as far. The mean is kept apart, so that it can be moved out of an input afterwards.
`solve.covariance` makes a matrix of it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import HELD_OUT, InputCovariance

_BLOCK = 1024  # channels whose products are added up together


def images_for_covariance(images: int) -> int:
    """How many of `images`, the first ones, the search may learn from."""
    return images * (HELD_OUT - 1) // HELD_OUT


@dataclass(slots=True)
class CovarianceSum:
    """Sums over tokens, to which batches are added one after the other."""

    tokens: int = 0
    # (K,) near the mean: what it is taken from leaves small numbers, whose sums are nearly exact
    center: Tensor | None = None
    total: Tensor | None = None  # (K,) float64
    products: Tensor | None = None  # (K, K) float32, on and above the diagonal

    def add(self, tokens: Tensor) -> None:
        """`tokens` (M, K), in the order of their images."""
        if not len(tokens):
            return
        x = tokens.float()
        if self.center is None or self.total is None or self.products is None:
            self.center = x.mean(0)
            self.total = torch.zeros_like(self.center, dtype=torch.float64)
            self.products = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32)
        x = x.sub_(self.center)
        self.tokens += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        for first in range(0, x.shape[1], _BLOCK):
            part = slice(first, first + _BLOCK)
            self.products[part, first:].addmm_(x[:, part].T, x[:, first:])

    def covariance(self, *, more_than: int) -> InputCovariance | None:
        """None where there are no more tokens than that."""
        if self.tokens <= more_than or self.center is None or self.total is None or self.products is None:
            return None
        mean = (self.total / self.tokens).float()
        covariance = self.products.div_(self.tokens).addr_(mean, mean, alpha=-1)
        self.products = None
        return stored_covariance(self.center + mean, covariance, self.tokens)


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


def covariance_bytes(width: int) -> int:
    """What the covariance of `width` channels takes, in memory and on the disk."""
    return width * (width - 1) + 8 * width
