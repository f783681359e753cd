"""What moves in a video: PSNR of the differences between frames that follow each other; higher is better.

Frames that each come close to the reference's may still flicker, which shows in their differences alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from svdq_cli.metrics.metric import same_size_pixels
from svdq_cli.metrics.psnr import PSNR_CAP_DB

if TYPE_CHECKING:
    from PIL.Image import Image


def temporal_psnr_db(reference: tuple[Image, Image], other: tuple[Image, Image]) -> float:
    """10 log10(255^2 / mse) of the difference between two frames against the reference's, at most PSNR_CAP_DB.

    Each of the two is a frame and the one that follows it.
    """
    before, before_other = same_size_pixels(reference[0], other[0])
    after, after_other = same_size_pixels(reference[1], other[1])
    moved = (after - before) - (after_other - before_other)
    mse = moved.square().double().mean().item()
    return min(PSNR_CAP_DB, 10 * math.log10(255**2 / mse)) if mse > 0 else PSNR_CAP_DB
