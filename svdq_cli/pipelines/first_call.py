"""A pipeline's run up to where it first calls its denoiser, which need not have weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from svdq_cli.pipelines.batches import Batch
from svdq_cli.pipelines.embeddings import EncodedPrompts
from svdq_cli.pipelines.generate import denoise
from svdq_cli.pipelines.settings import SamplingSettings

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs


class _Called(BaseException):
    """Ends the run. No Exception: Modular Diffusers logs those on their way."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


def first_call(
    pipe: DiffusionPipeline,
    denoisers: Iterable[nn.Module],
    batch: Batch,
    *,
    settings: SamplingSettings,
    encoded: EncodedPrompts | None = None,
) -> Arguments | None:
    """What the pipeline gives the denoiser that it calls first; None where it calls none. `encoded`: as `denoise` takes
    it."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called((args, kwargs))

    handles = [denoiser.register_forward_pre_hook(stop, with_kwargs=True) for denoiser in denoisers]
    try:
        denoise(pipe, batch, settings=settings, output_type="latent", encoded=encoded)
    except _Called as called:
        return called.arguments
    finally:
        for handle in handles:
            handle.remove()
    return None
