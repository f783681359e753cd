"""The structural plan: what becomes of the layers of a model that no family file describes.

Layers of repeated blocks become W4A4, those among them that read conditioning vectors or only modulate W4A16. What
chooses experts, networks that make the modulation of all blocks, and what is outside the blocks stay at 16 bits. All
of this is seen in one forward pass (`trace_inputs`); where none could be run, every layer is taken alone, and names
tell the modulation.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from svdq_cli.planning.inventory import Inventory
from svdq_cli.records import SharedInput

STRUCTURAL = "structural"  # the family name of such a plan

# Why a layer of a block stays at 16 bits
ROUTER = "it chooses experts: an error there sends tokens to other weights"
SPARE = "it runs in pipelines for a special task alone, such as inpainting"
MAKES_CONDITIONS = "it makes the modulation of all blocks from timestep or guidance"

# Words of names that diffusers gives to projections of a conditioning vector: img_mod.1, adaLN_modulation.0. Whole
# words, because "mode", "model", "module" and "adapter" are other things.
_MODULATION_WORDS = frozenset({"mod", "modulation", "adaln", "adanorm"})
_MODULATION_PATH = re.compile(r"(^|\.)(norm\w*\.(linear\w*|fc)|\w*time_emb_proj)$")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a layer read in a forward pass, and what became of its output."""

    source: int  # equal for layers that read the very same tensor
    tokens: int  # rows of one image; a conditioning vector has 1
    # the latents are among what it is computed from; False: of text or conditions alone
    of_image: bool = True
    chooses: bool = False  # its output chooses experts
    # it reads conditioning vectors, or its output only scales, shifts or gates channels
    modulates: bool = False
    conditions: bool = False  # many rows that come from timestep, guidance and the like alone
    spare: bool = False  # it comes from an argument alone that only pipelines for a special task give


@dataclass(frozen=True, slots=True)
class Roles:
    """How layers are quantized, and which of them share an input. The rest stays at 16 bits."""

    w4a4: frozenset[str]
    w4a16: frozenset[str]
    inputs: tuple[SharedInput, ...]
    kept: Mapping[str, str] = field(default_factory=dict[str, str])  # layers of blocks, and why they stay
    by_names: bool = False  # no forward pass showed them, nor does a family file

    @property
    def quantized(self) -> frozenset[str]:
        return self.w4a4 | self.w4a16


def structural_roles(inventory: Inventory, readings: Mapping[str, Reading] | None) -> Roles:
    """Roles of every layer by structure. `readings` None: no forward pass could be run.

    1x1 convolutions stay at 16 bits unless a recipe includes them. Keys and values of text are treated as any other
    layer, however many blocks read the same text.
    """
    members = [
        (linear.name, block)
        for linear in inventory.linears
        if linear.kind == "linear" and (block := block_of(linear.name, inventory.stacks))
    ]
    seen = _with_siblings([name for name, _ in members], readings or {})
    w4a16 = set[str]()
    kept: dict[str, str] = {}
    for name, _ in members:
        reading = seen.get(name)
        if reading is None:
            w4a16 |= {name} if _named_as_modulation(name) else set()
        elif reading.chooses:
            kept[name] = ROUTER
        elif reading.spare:
            kept[name] = SPARE
        elif reading.conditions:
            kept[name] = MAKES_CONDITIONS
        elif reading.modulates:
            w4a16.add(name)
    w4a4 = {name for name, _ in members} - w4a16 - kept.keys()
    groups: dict[object, list[str]] = defaultdict(list)
    for name, block in members:
        if name in w4a4 | w4a16:
            reading = (readings or {}).get(name)
            groups[(block, name in w4a16, reading.source) if reading else name].append(name)
    return Roles(
        frozenset(w4a4),
        frozenset(w4a16),
        tuple(shared_input(names) for names in groups.values()),
        kept,
        readings is None,
    )


def _with_siblings(names: list[str], readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """The readings, and for layers that the pass left out (experts that no token went to) those of layers at the same
    place of other blocks."""
    by_place = {_NUMBER.sub(".*", name): reading for name, reading in readings.items()}
    found = {name: readings.get(name) or by_place.get(_NUMBER.sub(".*", name)) for name in names}
    return {name: reading for name, reading in found.items() if reading is not None}


_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def joined_roles(first: Roles, other: Roles, prefix: str) -> Roles:
    """Both, the names of `other` with a prefix."""

    def named(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    inputs = tuple(
        SharedInput(prefix + shared.name, named(shared.layers), tuple(map(named, shared.branches)))
        for shared in other.inputs
    )
    return Roles(
        first.w4a4.union(named(other.w4a4)),
        first.w4a16.union(named(other.w4a16)),
        (*first.inputs, *inputs),
        {**first.kept, **{prefix + name: why for name, why in other.kept.items()}},
        first.by_names or other.by_names,
    )


def shared_input(names: list[str]) -> SharedInput:
    """Layers with one input, each with its own low-rank branch: no runtime of an unknown model fuses them."""
    return SharedInput(names[0], tuple(names), tuple((name,) for name in names))


def block_of(name: str, stacks: tuple[str, ...]) -> str | None:
    """The block a layer is in: "layers.3.attn.q" -> "layers.3"; None outside the stacks."""
    for stack in stacks:
        if name.startswith(stack + "."):
            return f"{stack}.{name[len(stack) + 1 :].split('.')[0]}"
    return None


def _named_as_modulation(name: str) -> bool:
    words = re.split(r"[._]", ".".join(name.split(".")[-3:]).lower())
    return not _MODULATION_WORDS.isdisjoint(words) or _MODULATION_PATH.search(name) is not None
