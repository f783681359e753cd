"""Do the 16-bit images show anything? Empty ones are close to each other whatever was lost, and PSNR rewards that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from svdq_cli.metrics.metric import pixels_of

# Levels of 255. A flat area of a real image varies by its noise and shading; a blank one of the embedded model has a
# standard deviation of 9, so that 32 levels hold 99.9 % of it.
UNIFORM_LEVELS = 32
UNIFORM_SHARE = 0.99  # of the pixels; the smallest object of the embedded model's captions takes 2 %
BLACK_LEVEL = 4
ALIKE_LEVELS = 8.0  # root mean square from the mean image; images of different prompts differ by 40 and more


@dataclass(frozen=True, slots=True)
class ImageProblems:
    """How many of `images` show nothing: `black` ones (what diffusers makes of numbers that are not finite, and safety
    checkers of what they refuse), `nearly_uniform` ones, and whether all are `alike` though their prompts differ."""

    images: int
    black: int
    nearly_uniform: int
    alike: bool
    kind: str = "image"  # of what the images show: "video" where they are its frames

    @property
    def meaningless(self) -> bool:
        """Whether figures of these images say nothing."""
        return self.alike or 2 * (self.black + self.nearly_uniform) >= self.images

    def sentences(self, whose: str) -> tuple[str, ...]:
        """What is wrong, for people; `whose`: "16-bit"."""
        found: list[str] = []
        if self.black:
            found.append(
                f"{self.black} of {self.images} {whose} {self.kind}s are black: "
                "values that are not finite, or a safety checker"
            )
        if self.nearly_uniform:
            found.append(f"{self.nearly_uniform} of {self.images} {whose} {self.kind}s are nearly one color")
        if self.alike:
            found.append(f"the {whose} {self.kind}s are all alike, though their prompts differ")
        return tuple(found)


def look_at(
    images: Iterable[Image.Image], *, different_prompts: bool = True, kind: str = "image"
) -> ImageProblems:
    """Reads the images one by one; sizes may not differ. `kind`: see `ImageProblems`."""
    count = black = uniform = 0
    total: Tensor | None = None
    squares = 0.0
    for image in images:
        pixels = pixels_of(image)
        count += 1
        is_black = bool(pixels.max() <= BLACK_LEVEL)
        black += is_black
        uniform += not is_black and _is_uniform(pixels)
        total = pixels.double() if total is None else total + pixels
        squares += pixels.double().square().mean().item()
    alike = False
    if count > 1 and total is not None and different_prompts and black + uniform < count:
        variance = squares / count - (total / count).square().mean().item()
        alike = max(variance, 0.0) ** 0.5 < ALIKE_LEVELS
    return ImageProblems(count, black, uniform, alike, kind)


def _is_uniform(pixels: Tensor) -> bool:
    """Whether nearly all pixels have the color of the median one. `pixels`: (3, H, W), 0..255."""
    middle = pixels.flatten(1).median(dim=1).values[:, None, None]
    near = (pixels - middle).abs().amax(dim=0) <= UNIFORM_LEVELS
    return near.to(torch.float64).mean().item() >= UNIFORM_SHARE
