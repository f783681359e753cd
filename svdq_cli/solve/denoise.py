"""The best weight for a noisy input: what the 4-bit part should be, before it is rounded.

Ours. The runtime multiplies with the quantized activation xq = x + e. The weight that reproduces x R^T best from xq is not
R but Wiener's R E[x xq^T] E[xq xq^T]^-1: directions in which activations are weaker than the quantizer's noise are turned
down. Estimated from plain moments of xq this over-fits (one free number per pair of channels), so the noise is taken
as what a quantizer's is: uncorrelated between channels and with other channels' values. Then

    E[x xq^T] = S + diag(c)     E[xq xq^T] = S + diag(2c + v)     S = E[x x^T], c = E[x e], v = E[e^2]

and only S, which is not noise, is a full matrix. A ridge adds variance that the rows did not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import Precision
from svdq_cli.solve.quantizers import fake_quantize_activation


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Second moments of smoothed activations and of their quantized form, over rows."""

    quantized: Tensor  # (K, K) float32: E[xq xq^T] as modelled above
    excess: Tensor  # (K,) float32: the diagonal of E[xq xq^T] - E[x xq^T], which is c + v


def moments(rows: Tensor, precision: Precision) -> Moments:
    """`rows` (M, K) float32, already divided by the smoothing factor."""
    noise = fake_quantize_activation(rows, precision) - rows
    shared, own = (rows * noise).mean(0), noise.square().mean(0)
    quantized = rows.T @ rows / rows.shape[0]
    quantized.diagonal().add_(2 * shared + own)
    return Moments(quantized, shared + own)


def denoised(residual: Tensor, seen: Moments, *, ridge: float) -> Tensor | None:
    """Wiener's weight (N, K) for `residual` (N, K); None where the moments can't be inverted.

    `ridge`: variance added to every channel of x, as a share of the mean variance of xq. Large values return `residual`.
    """
    matrix = seen.quantized.double()
    variance = matrix.diagonal().mean()
    if not bool(torch.isfinite(variance)) or variance <= 0:
        return None
    matrix.diagonal().add_(ridge * variance)
    # float64: the spectrum of activations spans six decades, and the ridge is all that bounds it from below
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    correction = torch.cholesky_solve((residual * seen.excess).T.double(), lower).T
    return residual - correction.to(residual.dtype)
