"""Smoothing factors: how much of each channel's outliers moves from the activation to the weight.

SVDQuant (arXiv 2411.05007), section 4.2 and appendix; the form s = absmax(x)^a / absmax(W)^b is SmoothQuant's
(arXiv 2211.10438, equation 4) with two free exponents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import NvFp4, Precision, reciprocal

# The paper's search: a from 0 to 1, b either 0 (activations alone decide) or 1 - a (SmoothQuant's line).
GRID: tuple[tuple[float, float], ...] = tuple(
    (round(a / 10, 2), b) for a in range(11) for b in dict.fromkeys((0.0, round(1 - a / 10, 2)))
)
CLOSED_FORM = (0.5, 0.5)

# A factor beyond this range means a dead or exploding channel; 16-bit storage and e4m3 scales want it bounded.
SMOOTH_RANGE = (2.0**-12, 2.0**12)

# nvfp4 activations have no tensor-level scale: group scales (peak / 6) must fit e4m3 (2^-6 .. 448 without loss). The
# calibrated peak is placed here, four times below the end of the range, as room for activations never seen.
_NVFP4_PEAK = 6 * 112.0


def smooth_factor(
    x_peak: Tensor,
    w_peak: Tensor,
    exponents: tuple[float, float],
    precision: Precision,
    *,
    dtype: torch.dtype,
    inverted: bool = False,
) -> Tensor:
    """s = x_peak^a / w_peak^b, (K,) float32 values that are exact in `dtype`.

    `x_peak`, `w_peak` (K,): absolute maxima per channel over the activation rows and over all weight rows that read
    them. A channel that is dead on either side gets what its neighbors have on average. `inverted`: 1/s is exact too.
    """
    a, b = exponents
    alive = (x_peak > 0) & (w_peak > 0) & torch.isfinite(x_peak)
    if not bool(alive.any()):
        return torch.ones_like(x_peak)
    log_s = a * x_peak.clamp(min=1e-30).log2() - b * w_peak.clamp(min=1e-30).log2()
    center = log_s[alive].mean()
    log_s = torch.where(alive, log_s, center) - center
    return snap_to_storage(log_s.exp2(), x_peak, precision, dtype=dtype, inverted=inverted)


def snap_to_storage(
    s: Tensor, x_peak: Tensor, precision: Precision, *, dtype: torch.dtype, inverted: bool = False
) -> Tensor:
    """s as it is stored: bounded, exact in `dtype`, and for nvfp4 of a size that places activations in e4m3's range.

    (The overall size of s is free for int4.) `inverted`: what is stored is 1/s. `s` and `x_peak` are (K,)."""
    s = s.clamp(*SMOOTH_RANGE)
    peak = (x_peak / s).max()
    if isinstance(precision, NvFp4) and bool(torch.isfinite(peak)) and peak > 0:
        s = s * torch.exp2(torch.ceil(torch.log2(peak / _NVFP4_PEAK)))
    return (invertible(s, dtype) if inverted else s.to(dtype)).float()


def invertible(s: Tensor, dtype: torch.dtype) -> Tensor:
    """s in `dtype`, moved by less than 0.8 % to where 1 / (1 / s), each rounded to it, is s again. Of any shape."""
    tiny = torch.finfo(dtype).smallest_normal
    return reciprocal(reciprocal(s.clamp(tiny, 1 / tiny).to(dtype)))
