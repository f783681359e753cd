"""Second moments of the inputs that a runtime multiplies with, from few rows or from the covariance of many tokens.

With about as many rows as channels a sample shows correlations that are not there, and whoever trusts them fits chance.
Shrinking them toward 0 by the share of their variance that is chance is Schäfer and Strimmer's estimator (2005, target
D; in the line of Ledoit and Wolf, 2004). That takes back what the sample exaggerates, and with it some of what is
true: the covariance of many tokens, where there is one, needs next to nothing of it (`covariance.trust`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.solve.quantizers import row_blocks

_LEAST_POWER = 1e-30


def second_moments(rows: Tensor) -> Tensor:
    """E[x xᵀ] (K, K) of rows (M, K), the products of different channels shrunk by `shrinkage`."""
    moments = rows.T @ rows / len(rows)
    share = shrinkage(rows, moments)
    diagonal = moments.diagonal().clone()
    moments.mul_(1 - share)
    moments.diagonal().copy_(diagonal)
    return moments


def shrinkage(rows: Tensor, moments: Tensor) -> float:
    """The share, 0 to 1, of what `moments` (K, K), the mean products of `rows` (M, K), say of different channels that
    is chance, each channel taken at its own size."""
    sizes = moments.diagonal().sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, torch.zeros_like(sizes))
    # both are sums over pairs of different channels
    products = -float((sizes > 0).sum())
    for part in row_blocks(moments):
        products += float((moments[part] * scale).mul_(scale[part].unsqueeze(1)).double().square_().sum())
    fourth = 0.0
    for part in row_blocks(rows):
        squares = (rows[part] * scale).double().square_()
        fourth += float(squares.sum(1).square_().sum() - squares.square_().sum())
    variance = (fourth / len(rows) - products) / max(len(rows) - 1, 1)
    return min(1.0, max(0.0, variance / products)) if products > 0 else 1.0


def quantized_moments(moments: Tensor, rows: Tensor, quantized: Tensor) -> Tensor:
    """E[q qᵀ] (K, K) of inputs after their quantizer, in the memory of `moments`, which are those before it.

    What the quantizer does to a channel is told by a few `rows` (M, K) and what it made of them, `quantized`: it keeps
    a share of the number, and adds noise of its own, which has nothing to do with other channels.
    """
    power = rows.square().mean(0).clamp_(min=_LEAST_POWER)
    kept = (rows * quantized).mean(0).div_(power)
    own = moments.diagonal() * (quantized.square().mean(0) / power)
    moments.mul_(kept).mul_(kept.unsqueeze(1))
    moments.diagonal().copy_(own)
    return moments
