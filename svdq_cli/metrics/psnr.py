"""PSNR, peak signal to noise of 8-bit RGB images; higher is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from svdq_cli.metrics.metric import Metric, each_pair, same_size_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

# Identical images have an infinite PSNR, which neither JSON nor a mean can hold. 100 dB is a mean squared
# error of 6.5e-6: one 8-bit step in one of 150 000 channel values.
PSNR_CAP_DB = 100.0


def psnr_db(a: Image, b: Image) -> float:
    """Peak signal to noise, 10 log10(255^2 / mse) over all pixels and channels, at most PSNR_CAP_DB."""
    import torch

    pixels_a, pixels_b = same_size_pixels(a, b)
    mse = (pixels_a - pixels_b).square().mean(dtype=torch.float64).item()
    return min(PSNR_CAP_DB, 10 * math.log10(255**2 / mse)) if mse > 0 else PSNR_CAP_DB


METRIC = Metric(
    key="psnr_db",
    title="PSNR",
    unit="dB",
    kind="pair",
    better="higher",
    load=lambda device, images: each_pair(psnr_db),
    place=0,
    digits=2,
    always=True,
)
