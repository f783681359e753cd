"""Broken images: a number that is not finite, on its way to an image, turns black or white in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdq_cli.errors import CheckFailedError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def require_finite_latents(pipe: DiffusionPipeline, latents: object, step: int) -> None:
    """CheckFailedError (kind `not-finite`) where the latents of a step, counted from 1, hold NaN or infinity."""
    if isinstance(latents, Tensor) and not bool(torch.isfinite(latents).all()):
        raise _not_finite(pipe, f"the latents of step {step}")


@contextmanager
def finite_images(pipe: DiffusionPipeline) -> Iterator[None]:
    """Raise InputError, inside the block, if the autoencoder decodes values that are not finite."""
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if not isinstance(decoder, nn.Module):
        yield
        return

    def after(_: nn.Module, __: object, decoded: Any) -> None:
        found = decoded[0] if isinstance(decoded, tuple) else getattr(decoded, "sample", decoded)
        if isinstance(found, Tensor) and not bool(torch.isfinite(found).all()):
            raise _not_finite(pipe, "the decoded image")

    handle = decoder.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _not_finite(pipe: DiffusionPipeline, what: str) -> CheckFailedError:
    return CheckFailedError(
        f"{type(pipe).__name__}: {what} hold{'s' * what.endswith('image')} NaN or infinity: the image would be black",
        hint="float16 holds no number above 65504: convert with dtype: bfloat16; if it already is, a weight is "
        "damaged, and svdq check CKPT --against SOURCE finds it",
        kind="not-finite",
    )
