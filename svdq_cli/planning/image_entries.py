"""How the tokens lie in what a layer reads: which of them are of one image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from svdq_cli.source import is_expert

# Models with blocks of (tokens, batch, K), beside layers of (batch, tokens, K): no shape alone tells them apart
_TOKENS_FIRST = ("ErnieImageTransformer2DModel",)


@dataclass(slots=True)
class CallBatch:
    """How many entries the batch of the denoiser's call has that is going on: one for each image, or as many more as
    guidance puts into one call. 0 before the first. `tokens_first`: whether the denoiser's blocks read (tokens, batch,
    K)."""

    entries: int = 0
    tokens_first: bool = False

    def batch_first(self, activation: Tensor) -> Tensor:
        """The activation as (batch, tokens, K), where a layer may read tokens first."""
        first, second = activation.shape[:2] if activation.ndim == 3 else (0, 0)
        turned = self.tokens_first and second == self.entries != first
        return activation.transpose(0, 1) if turned else activation

    def image_of(self, entry: int, entries: int, images: int) -> int:
        """Which of a batch's `images` an `entry` is of, where a layer reads `entries`.

        Guidance stacks all images as often as it passes them: [unconditional images, conditional images]. A layer of a
        video may have frames or places folded into its batch, image after image.
        """
        folded = max(1, entries // max(self.entries, images))
        return entry // folded % images


@contextmanager
def call_batches(denoisers: Iterable[nn.Module]) -> Iterator[CallBatch]:
    """Watches the calls of a pipeline's denoisers."""
    found = CallBatch()

    def see(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        # what is denoised is the first of what they are given: a tensor, or a list of one for each entry
        read = next((x for x in (*args, *given.values()) if isinstance(x, (Tensor, list))), None)
        found.entries = 0 if read is None else len(cast("Tensor", read))
        found.tokens_first = type(module).__name__ in _TOKENS_FIRST

    handles = [model.register_forward_pre_hook(see, with_kwargs=True) for model in denoisers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def by_entry(name: str, activation: Tensor, images: int, calls: CallBatch) -> Tensor:
    """(batch entries, tokens, K) of the activation (..., K) that the layer `name` reads in one call for `images`
    images, of the denoiser's call that is going on.

    A modulation layer's (batch, K) has one token an entry; an expert's (M, K) has as many tokens of each image, one
    image after the other.
    """
    width = activation.shape[-1]
    if activation.ndim == 1:
        return activation.reshape(1, 1, width)
    if activation.ndim == 2 and is_expert(name):
        return activation.reshape(images, -1, width)
    activation = calls.batch_first(activation)
    return activation.reshape(activation.shape[0], -1, width)
