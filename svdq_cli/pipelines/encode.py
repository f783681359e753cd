"""The text encoders' turn: every prompt is encoded before the denoiser is loaded, then they make room for it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from svdq_cli.pipelines.batches import Batch
from svdq_cli.pipelines.embeddings import METHOD, EncodedPrompts
from svdq_cli.pipelines.first_call import first_call
from svdq_cli.pipelines.joint import denoisers_in
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.records import Event, Observer, ignore_events

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_ENCODERS = "text_encoder"  # diffusers numbers the others: text_encoder_2, text_encoder_3


def encode_prompts(
    pipe: DiffusionPipeline,
    batches: Sequence[Batch],
    *,
    settings: SamplingSettings,
    observe: Observer = ignore_events,
) -> EncodedPrompts | None:
    """Encodes the batches' prompts and frees the text encoders. The denoisers may be empty models.

    None, and nothing is freed, for a pipeline that does not encode its prompts in one method, or calls its text
    encoders outside of it.
    """
    if not hasattr(type(pipe), METHOD):
        return None
    encoded = EncodedPrompts()
    denoisers = denoisers_in(pipe).values()
    started, total = time.monotonic(), sum(len(batch.prompts) for batch in batches)
    observe(Event("start", "encode", 0, total))
    done = 0
    elsewhere: list[str] = []
    for batch in batches:
        with encoded.recorded(pipe, batch), _calls_outside(pipe, encoded, elsewhere):
            first_call(pipe, denoisers, batch, settings=settings)
        done += len(batch.prompts)
        observe(Event("advance", "encode", done, total, seconds=time.monotonic() - started))
    observe(Event("end", "encode", total, total, seconds=time.monotonic() - started))
    if elsewhere or not all(encoded.answers.values()):
        return None
    _free_encoders(pipe)
    return encoded


def _encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith(_ENCODERS) and isinstance(part, nn.Module)}


@contextmanager
def _calls_outside(pipe: DiffusionPipeline, encoded: EncodedPrompts, found: list[str]) -> Iterator[None]:
    """Adds to `found` the text encoders that are called while the pipeline is not in its method."""

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: None if encoded.is_encoding else found.append(name)

    handles = [part.register_forward_pre_hook(note(name)) for name, part in _encoders(pipe).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FreedEncoder:
    """In the place of a text encoder that is gone: what pipelines ask one for besides its answers (DreamLite, for the
    dtype of its latents)."""

    def __init__(self, encoder: nn.Module) -> None:
        self.dtype, self.device = encoder.dtype, encoder.device
        self.config = getattr(encoder, "config", None)


def _free_encoders(pipe: DiffusionPipeline) -> None:
    for name, part in _encoders(pipe).items():
        setattr(pipe, name, FreedEncoder(part))
    gc.collect()  # modules with hooks refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
