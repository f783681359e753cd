"""Which images are generated together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdq_cli.pipelines.settings import SamplingSettings


@dataclass(frozen=True, slots=True)
class Batch:
    """Images that are generated together. `first` is the index of the first one among all images."""

    first: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def split_batches(
    prompts: Sequence[str], *, settings: SamplingSettings, seeds: Sequence[int] | None = None
) -> tuple[Batch, ...]:
    if isinstance(prompts, str):
        raise TypeError("prompts is one string, not a sequence of strings")
    chosen = tuple(seeds) if seeds is not None else tuple(map(settings.seed_of, range(len(prompts))))
    if len(chosen) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(chosen)} seeds")
    size = settings.batch_size
    return tuple(
        Batch(first, tuple(prompts[first : first + size]), chosen[first : first + size])
        for first in range(0, len(prompts), size)
    )
