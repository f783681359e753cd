"""Picture scores: PSNR and SSIM of 8-bit RGB pictures drawn from equal prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.reports import Summary

# Identical pictures have an infinite PSNR, which neither JSON nor a mean can hold. 100 dB is a mean squared
# error of 6.5e-6: one 8-bit step in one of 150 000 channel values.
PSNR_CAP_DB = 100.0
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, slots=True)
class PictureScores:
    """Scores of one set of pictures against the reference's: means over pictures, not scores of a mean."""

    psnr: Summary
    ssim: Summary


def compare(reference: Sequence[Image], other: Sequence[Image]) -> PictureScores:
    """Picture by picture. Raises InputError where the sets or two pictures differ in size."""
    if len(reference) != len(other) or not reference:
        raise InputError(
            f"{len(reference)} reference pictures and {len(other)} to compare",
            hint="draw both sets with the same prompts and seeds",
        )
    pairs = list(zip(reference, other, strict=True))
    return PictureScores(
        psnr=summarize([psnr_db(a, b) for a, b in pairs]), ssim=summarize([ssim(a, b) for a, b in pairs])
    )


def psnr_db(a: Image, b: Image) -> float:
    """Peak signal to noise, 10 log10(255^2 / mse) over all pixels and channels, at most PSNR_CAP_DB."""
    pixels_a, pixels_b = _same_size_pixels(a, b)
    mse = (pixels_a - pixels_b).square().mean(dtype=torch.float64).item()
    return min(PSNR_CAP_DB, 10 * math.log10(255**2 / mse)) if mse > 0 else PSNR_CAP_DB


def ssim(a: Image, b: Image) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window, 11 pixels, sigma 1.5), 1.0 if equal."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    pixels_a, pixels_b = _same_size_pixels(a, b)
    if min(a.size) < 11:
        raise InputError(f"a picture of {a.width} x {a.height} is smaller than SSIM's window of 11 pixels")
    # float64: a variance is the difference of two near equal numbers, and float32 gives equal flat pictures 0.99998
    batch_a, batch_b = ((pixels.double() / 255).unsqueeze(0) for pixels in (pixels_a, pixels_b))
    score = structural_similarity_index_measure(batch_a, batch_b, data_range=1.0)
    assert isinstance(score, Tensor)
    return score.item()


def summarize(figures: Sequence[float], noise: Sequence[float] = ()) -> Summary:
    """Mean, population standard deviation (0 for one figure), extremes, and a bootstrap interval of the mean.

    `noise`: differences of a figure between two runs that nobody can tell apart; the interval includes them.
    """
    values = torch.tensor(figures, dtype=torch.float64)
    return Summary(
        mean=values.mean().item(),
        std=values.std(correction=0).item(),
        min=values.min().item(),
        max=values.max().item(),
        ci95=_mean_interval(values, torch.tensor(list(noise), dtype=torch.float64)),
    )


def _mean_interval(values: Tensor, noise: Tensor) -> tuple[float, float] | None:
    """95 % confidence interval of the mean by the percentile bootstrap (Efron 1979), which assumes no distribution:
    PSNR over pictures is skewed. Every figure that is drawn is moved by one of `noise`, up or down. Seeded, so that
    equal figures have equal intervals; None for a single figure."""
    count = len(values)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    means: list[Tensor] = []
    for _ in range(BOOTSTRAP_SAMPLES):
        drawn = values[torch.randint(count, (count,), generator=generator)]
        if len(noise):
            moved = noise[torch.randint(len(noise), (count,), generator=generator)]
            drawn = drawn + moved * (2 * torch.randint(2, (count,), generator=generator) - 1)
        means.append(drawn.mean())
    low, high = torch.quantile(torch.stack(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _same_size_pixels(a: Image, b: Image) -> tuple[Tensor, Tensor]:
    if a.size != b.size:
        raise InputError(
            f"pictures of {a.width} x {a.height} and {b.width} x {b.height} pixels cannot be compared",
            hint="draw both with the same height and width",
        )
    return pixels_of(a), pixels_of(b)


def pixels_of(image: Image) -> Tensor:
    """(3, H, W) float32, 0..255."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1).float()
