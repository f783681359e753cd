"""How much of a difference is chance: the 4-bit model against itself, its start noise off by one rounding.

Rounding activations to 4 bits is a staircase. A change too small to see moves some of them to the next step, and these
differences grow over the steps of an image. Another batch size or another machine changes as little, so figures of two
runs can't be told apart more finely than this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# In 16 bits one rounding is 0.4 %, no small change. One number in 4096 changes the noise as a whole by 6e-5.
SPACING_OF_16_BIT = 4096


def can_nudge(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline makes its start noise where it can be reached."""
    return callable(getattr(pipe, "prepare_latents", None))


@contextmanager
def nudged_start(pipe: DiffusionPipeline) -> Iterator[None]:
    """Images that are generated inside start from noise that is off by one rounding."""
    made: Any = pipe.prepare_latents  # type: ignore[attr-defined]

    def nudging(*args: Any, **kwargs: Any) -> Any:
        latents = made(*args, **kwargs)
        if isinstance(latents, tuple):  # with position ids, or with the latents of an image
            return (nudged(latents[0]), *latents[1:])
        return nudged(latents)

    replaced = vars(pipe).get("prepare_latents")
    vars(pipe)["prepare_latents"] = nudging
    try:
        yield
    finally:
        if replaced is None:
            del vars(pipe)["prepare_latents"]
        else:
            vars(pipe)["prepare_latents"] = replaced


def nudged(latents: Tensor) -> Tensor:
    """Every number moved to the next larger one of its type; of 16-bit types only some of them. Of any shape, which
    stays."""
    larger = torch.nextafter(latents, torch.full_like(latents, float("inf")))
    if latents.dtype.itemsize > 2:
        return larger
    moved = latents.clone()
    moved.view(-1)[::SPACING_OF_16_BIT] = larger.view(-1)[::SPACING_OF_16_BIT]
    return moved
