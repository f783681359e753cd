"""The best weight for a noisy input: what the 4-bit part should be, before it is rounded.

Ours. The runtime multiplies with the quantized activation xq. The weight that reproduces x R^T best from xq is not R
but Wiener's R E[x xq^T] E[xq xq^T]^-1: directions in which activations are weaker than the quantizer's noise are turned
down. Estimated from plain moments of xq this over-fits (one free number per pair of channels), so the quantizer is
modelled as a gain and independent noise per channel (Bussgang's decomposition):

    xq_k = g_k x_k + n_k     g = E[x xq] / E[x^2]     v = E[n^2] = E[xq^2] - g^2 E[x^2]

With S = E[x x^T] and A = diag(g) S diag(g) + diag(v), Wiener's weight is R S diag(g) A^-1 = (R / g) (I - diag(v) A^-1).
A ridge on S stands for activations that the rows did not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import Precision
from svdq_cli.solve.quantizers import fake_quantize_activation

# A channel that is (nearly) always rounded to zero has a gain near 0; its weight must not be blown up for that.
GAIN_RANGE = (0.5, 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Second moments of smoothed activations, and the quantizer's gain and noise."""

    signal: Tensor  # (K, K) float32: S
    gain: Tensor  # (K,) float32: g
    noise: Tensor  # (K,) float32: v


def moments(rows: Tensor, precision: Precision) -> Moments:
    """`rows` (M, K) float32, already divided by the smoothing factor."""
    quantized = fake_quantize_activation(rows, precision)
    power = rows.square().mean(0)
    gain = (rows * quantized).mean(0) / power.clamp(min=1e-30)
    gain = torch.where(power > 0, gain, torch.ones_like(gain)).clamp(*GAIN_RANGE)
    noise = (quantized.square().mean(0) - gain.square() * power).clamp(min=0)
    return Moments(rows.T @ rows / rows.shape[0], gain, noise)


def denoised(residual: Tensor, seen: Moments, *, ridge: float) -> Tensor | None:
    """Wiener's weight (N, K) for `residual` (N, K); None where the moments say nothing.

    `ridge`: variance added to every channel of x, as a share of the mean. The smaller, the more is trusted to the rows.
    """
    signal = seen.signal.double()
    variance = signal.diagonal().mean()
    if not bool(torch.isfinite(variance)) or variance <= 0:
        return None
    signal.diagonal().add_(ridge * variance)
    # float64: the spectrum of activations spans six decades, and the ridge is all that bounds it from below
    signal.mul_(seen.gain).mul_(seen.gain.unsqueeze(1)).diagonal().add_(seen.noise)
    signal, failed = torch.linalg.cholesky_ex(signal)
    if int(failed):
        return None
    scaled = residual / seen.gain
    correction = torch.cholesky_solve((scaled * seen.noise).T.double(), signal).T
    return scaled - correction.to(residual.dtype)
