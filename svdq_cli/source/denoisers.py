"""Pipelines with several denoisers (the two transformers of Wan 2.2) as one source, whose names tell them apart.

Layers and tensors of the first denoiser have the names they have in its own weights. Those of the others have
behind the name of their component: `transformer_2.blocks.0.attn1.to_q`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from svdq_cli.source.model import Source

T = TypeVar("T")

_TURNS = ("transformer", "transformer_2")  # the first has the first steps

# What Wan's own files, ComfyUI's and those of LoRAs say of the two transformers of Wan 2.2. No word that ends in "low".
_HIGH_NOISE, _LOW_NOISE = (
    re.compile(rf"(?:(?<![A-Za-z]){word}|{word.title()}|(?<![A-Z]){word.upper()})[-_ ]?(?i:noise)")
    for word in ("high", "low")
)


def prefix_of(components: Sequence[str], component: str) -> str:
    """The prefix of the names of a component's layers, where `components` are converted together."""
    return "" if component == components[0] else f"{component}."


def by_component(components: Sequence[str], values: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Values by layer or tensor, as dicts of every component under its own names."""
    found: dict[str, dict[str, T]] = {component: {} for component in components}
    for name, value in values.items():
        component, own = component_of(components, name)
        found[component][own] = value
    return found


def component_of(components: Sequence[str], name: str) -> tuple[str, str]:
    """The component that a layer or tensor belongs to, and its name there."""
    head, _, rest = name.partition(".")
    return (head, rest) if head in components[1:] and rest else (components[0], name)


def take_turns(components: Sequence[str]) -> bool:
    """Whether these denoisers of one pipeline have each a part of the steps (Wan 2.2); others run in every step."""
    return tuple(components) == _TURNS


def named_denoiser(components: Sequence[str], name: str) -> str | None:
    """Which of the two transformers of Wan 2.2 a file's name tells: `high_noise` the first, `low_noise` the second.
    None where it tells neither, or the pipeline's denoisers are others."""
    if not take_turns(components):
        return None
    high, low = (pattern.search(name) is not None for pattern in (_HIGH_NOISE, _LOW_NOISE))
    return None if high == low else components[0 if high else 1]


def joined(sources: Sequence[Source]) -> Source:
    """The denoisers of one pipeline as one source; `sources` are of one denoiser each."""
    first, *others = sources
    if not others:
        return first
    tensors = dict(first.tensors)
    for other in others:
        tensors |= {f"{other.component}.{name}": entry for name, entry in other.tensors.items()}
    return replace(
        first,
        tensors=tensors,
        further={other.component: other.config for other in others},
        warnings=tuple(warning for source in sources for warning in source.warnings),
    )


def denoisers_of(source: Source) -> tuple[Source, ...]:
    """Every denoiser alone, under its own names."""
    if not source.further:
        return (source,)
    tensors = by_component(source.components, source.tensors)
    return tuple(
        replace(
            source,
            component=component,
            config=source.configs[component],
            tensors=MappingProxyType(tensors[component]),
            further=MappingProxyType({}),
            warnings=source.warnings if component == source.component else (),
        )
        for component in source.components
    )


def only(source: Source, components: Sequence[str]) -> Source:
    """The source with these of its denoisers, in this order. A component that it lacks is left out; without any of
    them it is returned as it is."""
    if tuple(components) == source.components:
        return source
    parts = {part.component: part for part in denoisers_of(source)}
    chosen = [parts[component] for component in components if component in parts]
    return joined(chosen) if chosen else source
