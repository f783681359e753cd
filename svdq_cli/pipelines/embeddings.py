"""Prompts encoded once: what a pipeline's `encode_prompt` answers is kept, so that its text encoders can go.

Pipelines differ in what they encode (one encoder or three, pooled, masked, with images) but not in where: in the
method `encode_prompt`. Its answers are kept as they are and given again in the order in which they were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from svdq_cli.pipelines.batches import Batch

METHOD = "encode_prompt"


@dataclass(slots=True)
class EncodedPrompts:
    """The results of `encode_prompt` by batch, in the order of the calls: a prompt and perhaps its negative."""

    answers: dict[Batch, list[Any]] = field(default_factory=dict)  # nests of tensors, on the CPU
    is_encoding: bool = False  # while the pipeline is in the method, being recorded

    @contextmanager
    def recorded(self, pipe: DiffusionPipeline, batch: Batch) -> Iterator[None]:
        """Keeps what the pipeline encodes for `batch`."""
        encode = getattr(pipe, METHOD)
        answers = self.answers[batch] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            self.is_encoding = True
            try:
                answer = encode(*args, **kwargs)
            finally:
                self.is_encoding = False
            answers.append(tree_map(_to(torch.device("cpu")), answer))
            return answer

        with _replaced(pipe, keep):
            yield

    @contextmanager
    def replayed(self, pipe: DiffusionPipeline, batch: Batch) -> Iterator[None]:
        """The pipeline gets for `batch` what was kept, on the device that it runs on."""
        answers = iter(self.answers[batch])
        device = pipe._execution_device

        def answer(*args: Any, **kwargs: Any) -> Any:
            return tree_map(_to(device), next(answers))

        with _replaced(pipe, answer):
            yield


@contextmanager
def _replaced(pipe: DiffusionPipeline, function: Any) -> Iterator[None]:
    setattr(pipe, METHOD, function)  # hides the class's own
    try:
        yield
    finally:
        delattr(pipe, METHOD)


def _to(device: torch.device) -> Any:
    return lambda value: value.to(device) if isinstance(value, Tensor) else value
