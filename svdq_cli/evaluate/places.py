"""Where a layer stands in its model, read off its name: stack of blocks, block, place within the block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """`single_transformer_blocks.7.attn.to_q` is stack `single_transformer_blocks.*`, block `7`, role `attn.to_q`."""

    stack: str  # the block's path with its numbers left open; "" outside all blocks
    block: str  # those numbers: "7", "1.0.3"; "" outside all blocks
    role: str  # the rest of the name


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Every layer's place, by name. A block is the deepest numbered module that holds several of `names`."""
    held = Counter(prefix for name in names for prefix in _numbered(name))
    return {name: _place(name, [p for p in _numbered(name) if held[p] > 1]) for name in names}


def in_blocks(names: Iterable[str], places: dict[str, Place]) -> list[str]:
    """The same layers, those of one block together, blocks of one stack together, the others last."""
    stacks: dict[str, dict[str, list[str]]] = {}
    for name in names:
        place = places[name]
        stacks.setdefault(place.stack, {}).setdefault(place.block, []).append(name)
    ordered = sorted(stacks, key=lambda stack: stack == "")  # stable: stacks stay in the order of the model
    return [name for stack in ordered for block in stacks[stack].values() for name in block]


def _numbered(name: str) -> Iterator[str]:
    """The modules above a layer whose names are numbers, outermost first: "blocks.3" of "blocks.3.attn.to_q"."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if parts[end - 1].isdigit():
            yield ".".join(parts[:end])


def _place(name: str, blocks: Sequence[str]) -> Place:
    if not blocks:
        return Place("", "", name)
    parts = blocks[-1].split(".")
    stack = ".".join("*" if part.isdigit() else part for part in parts)
    block = ".".join(part for part in parts if part.isdigit())
    return Place(stack, block, name[len(blocks[-1]) + 1 :])
