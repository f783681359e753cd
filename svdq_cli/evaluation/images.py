"""Image scores: PSNR and SSIM of 8-bit RGB images generated from equal prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.metrics.psnr import PSNR_CAP_DB, psnr_db
from svdq_cli.metrics.ssim import ssim
from svdq_cli.reports import Summary

__all__ = ["PSNR_CAP_DB", "ImageScores", "compare", "psnr_db", "ssim", "summarize"]

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Scores of one set of images against the reference's: means over images, not scores of a mean."""

    psnr: Summary
    ssim: Summary


def compare(reference: Sequence[Image], other: Sequence[Image]) -> ImageScores:
    """Image by image. Raises InputError where the sets or two images differ in size."""
    if len(reference) != len(other) or not reference:
        raise InputError(
            f"{len(reference)} reference images, but {len(other)} to compare",
            hint="generate both sets with the same prompts and seeds",
        )
    pairs = list(zip(reference, other, strict=True))
    return ImageScores(
        psnr=summarize([psnr_db(a, b) for a, b in pairs]), ssim=summarize([ssim(a, b) for a, b in pairs])
    )


def summarize(figures: Sequence[float], noise: Sequence[float] = ()) -> Summary:
    """Mean, population standard deviation (0 for one figure), extremes, and a bootstrap interval of the mean.

    `noise`: differences of a metric between two runs that can't be told apart; the interval includes them.
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
    PSNR over images is skewed. Every figure that is sampled is moved by one of `noise`, up or down. Seeded, so that
    equal figures have equal intervals; None for a single figure."""
    count = len(values)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    means: list[Tensor] = []
    for _ in range(BOOTSTRAP_SAMPLES):
        sampled = values[torch.randint(count, (count,), generator=generator)]
        if len(noise):
            moved = noise[torch.randint(len(noise), (count,), generator=generator)]
            sampled = sampled + moved * (2 * torch.randint(2, (count,), generator=generator) - 1)
        means.append(sampled.mean())
    low, high = torch.quantile(torch.stack(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
