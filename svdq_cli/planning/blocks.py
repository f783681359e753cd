"""Which block of its model a layer belongs to, read from layer names: stack of blocks, block, role within the block.

The one place that knows. A block is the deepest numbered module that holds several layers, so that a UNet's level
("down_blocks.1") is not taken for one of its transformer blocks.
"""

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

    @property
    def path(self) -> str:
        """The block's own path: "single_transformer_blocks.7"; "" outside all blocks."""
        numbers = iter(self.block.split("."))
        return ".".join(next(numbers) if part == "*" else part for part in self.stack.split("."))

    @property
    def pattern(self) -> str:
        """The layer's name with the numbers of its block left open: "single_transformer_blocks.*.attn.to_q"."""
        return f"{self.stack}.{self.role}" if self.stack else self.role


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Every layer's place, by name. A block is the deepest numbered module that holds several of `names`."""
    held = Counter(prefix for name in names for prefix in _numbered(name))
    return {name: _place(name, [p for p in _numbered(name) if held[p] > 1]) for name in names}


def blocks_of(names: Sequence[str]) -> tuple[str, ...]:
    """The paths of the blocks of `names` that hold no other block, in the order of the names."""
    paths = list(dict.fromkeys(place.path for place in places_of(names).values() if place.stack))
    return tuple(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))


def in_blocks(names: Iterable[str], places: dict[str, Place]) -> list[str]:
    """Layers ordered so that those of one block are together, blocks of one stack together, the others last."""
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
