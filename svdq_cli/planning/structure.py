"""The structural plan: what becomes of the layers of a model that no family file describes.

Layers of repeated blocks become W4A4, those among them that read one conditioning vector (modulation) W4A16, and what
stands outside the blocks stays at 16 bit. Which layers read the same activation is seen in one forward pass
(`watching`); where none could be run, every layer is taken alone, and names tell the modulation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from svdq_cli.planning.inventory import Inventory
from svdq_cli.records import Linear, SharedInput

STRUCTURAL = "structural"  # the family name of such a plan

# Names that diffusers gives to projections of a conditioning vector: norm1.linear, img_mod.1, adaLN_modulation.0, ...
_MODULATION = re.compile(
    r"(^|\.)((norm\w*\.(linear\w*|fc))|\w*(mod|modulation)\w*(\.\w+)*|ada\w*(\.\w+)*|\w*time_emb_proj)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a layer read in a forward pass."""

    source: int  # equal for layers that read the very same tensor
    tokens: int  # rows of one batch entry; a conditioning vector has 1


@dataclass(frozen=True, slots=True)
class Roles:
    """Which layers are quantized and how, and which of them share an input. The rest stays at 16 bit."""

    w4a4: frozenset[str]
    w4a16: frozenset[str]
    inputs: tuple[SharedInput, ...]


def structural_roles(inventory: Inventory, readings: Mapping[str, Reading] | None) -> Roles:
    """Roles of every layer by structure. `readings` None: no forward pass could be run.

    1x1 convolutions stay at 16 bit unless a recipe includes them. So do layers that read one tensor in many blocks:
    the keys and values of a cross-attention, which cost little and which published recipes keep.
    """
    members = [
        (linear, block)
        for linear in inventory.linears
        if linear.kind == "linear" and (block := block_of(linear.name, inventory.stacks))
    ]
    w4a16 = {linear.name for linear, _ in members if _is_modulation(linear, readings)}
    common = _read_in_many_blocks(members, readings or {})
    w4a4 = {linear.name for linear, _ in members} - w4a16 - common
    groups: dict[object, list[str]] = defaultdict(list)
    for linear, block in members:
        if linear.name in w4a4 | w4a16:
            reading = (readings or {}).get(linear.name)
            modulation = linear.name in w4a16
            groups[(block, modulation, reading.source) if reading else linear.name].append(linear.name)
    return Roles(frozenset(w4a4), frozenset(w4a16), tuple(shared_input(names) for names in groups.values()))


def joined_roles(first: Roles, other: Roles, prefix: str) -> Roles:
    """Both, the names of `other` with a prefix."""

    def named(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    inputs = tuple(
        SharedInput(prefix + shared.name, named(shared.layers), tuple(map(named, shared.branches)))
        for shared in other.inputs
    )
    return Roles(
        first.w4a4.union(named(other.w4a4)), first.w4a16.union(named(other.w4a16)), (*first.inputs, *inputs)
    )


def shared_input(names: list[str]) -> SharedInput:
    """Layers with one input, each with its own low-rank branch: no runtime of an unknown model fuses them."""
    return SharedInput(names[0], tuple(names), tuple((name,) for name in names))


def block_of(name: str, stacks: tuple[str, ...]) -> str | None:
    """The block a layer stands in: "layers.3.attn.q" -> "layers.3"; None outside the stacks."""
    for stack in stacks:
        if name.startswith(stack + "."):
            return f"{stack}.{name[len(stack) + 1 :].split('.')[0]}"
    return None


def _is_modulation(linear: Linear, readings: Mapping[str, Reading] | None) -> bool:
    if readings is not None and linear.name in readings:
        return readings[linear.name].tokens == 1
    return _MODULATION.search(linear.name) is not None


def _read_in_many_blocks(members: list[tuple[Linear, str]], readings: Mapping[str, Reading]) -> set[str]:
    blocks: dict[int, set[str]] = defaultdict(set)
    for linear, block in members:
        if linear.name in readings:
            blocks[readings[linear.name].source].add(block)
    return {
        linear.name
        for linear, _ in members
        if linear.name in readings
        and readings[linear.name].tokens > 1
        and len(blocks[readings[linear.name].source]) > 1
    }
