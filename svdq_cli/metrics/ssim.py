"""SSIM, structural similarity of 8-bit RGB images: 1 for equal ones, higher is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdq_cli.errors import InputError
from svdq_cli.metrics.metric import Metric, each_pair, same_size_pixels

if TYPE_CHECKING:
    from PIL.Image import Image


def ssim(a: Image, b: Image) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window, 11 pixels, sigma 1.5), 1.0 if equal."""
    from torch import Tensor
    from torchmetrics.functional.image import structural_similarity_index_measure

    pixels_a, pixels_b = same_size_pixels(a, b)
    if min(a.size) < 11:
        raise InputError(
            f"an image of {a.width} x {a.height} pixels is smaller than SSIM's window of 11 pixels"
        )
    # float64: a variance is the difference of two near equal numbers, and float32 gives equal flat images 0.99998
    batch_a, batch_b = ((pixels.double() / 255).unsqueeze(0) for pixels in (pixels_a, pixels_b))
    score = structural_similarity_index_measure(batch_a, batch_b, data_range=1.0)
    assert isinstance(score, Tensor)
    return score.item()


METRIC = Metric(
    key="ssim",
    title="SSIM",
    kind="pair",
    better="higher",
    load=lambda device, images: each_pair(ssim),
    place=1,
    digits=4,
    always=True,
)
