"""How the layers of one model family are stored in one file format, as data: names, orders and roles, never bits.

A format that keeps diffusers' modules needs none of this. Others stack q, k and v into one matrix, cut a matrix in two,
or rename what they store. Source layers are named as in the diffusers model, relative to their block; stored modules as
in the file, relative to the stored block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# ---------------------------------------------------------------------------------------------------- row orders


@dataclass(frozen=True, slots=True)
class Stacked:
    """The rows of the layers under one another."""


@dataclass(frozen=True, slots=True)
class Interleaved:
    """The stacked rows, cut into `parts` equal blocks: row `parts * c + j` is row c of block j."""

    parts: int


@dataclass(frozen=True, slots=True)
class HalvesSwapped:
    """The second half of the stacked rows first."""


@dataclass(frozen=True, slots=True)
class KeysAndValuesByHead:
    """Three equal blocks q, k, v: first q, then for each head its `width` rows of k and its `width` rows of v."""

    width: int


RowOrder = Stacked | Interleaved | HalvesSwapped | KeysAndValuesByHead
STACKED = Stacked()

# ---------------------------------------------------------------------------------------------------- modules


@dataclass(frozen=True, slots=True)
class ColumnPart:
    """The layer reads the outputs of `fed_by` side by side; the module holds the columns fed by `fed_by[index]`.

    The module of the last part carries the layer's bias.
    """

    fed_by: tuple[str, ...]
    index: int


@dataclass(frozen=True, slots=True)
class ModuleRule:
    """One stored module of a block. `branches`: its layers, those with one low-rank down projection together."""

    stored: str
    branches: tuple[tuple[str, ...], ...]
    order: RowOrder = STACKED
    columns: ColumnPart | None = None
    after_gelu: bool = False  # its input is what a plain GELU returns, so never below -0.17
    one_plus: tuple[
        int, ...
    ] = ()  # blocks of `Interleaved` that the model uses as 1 + x, and the runtime as x

    @property
    def layers(self) -> tuple[str, ...]:
        """All source layers, in the order in which their rows are stacked."""
        return tuple(layer for branch in self.branches for layer in branch)


def same(name: str) -> ModuleRule:
    """A layer that is stored as it is."""
    return ModuleRule(name, ((name,),))


def renamed(stored: str, layer: str, *, after_gelu: bool = False) -> ModuleRule:
    """One layer under another name."""
    return ModuleRule(stored, ((layer,),), after_gelu=after_gelu)


def stacked(stored: str, *layers: str) -> ModuleRule:
    """Layers with one input and one down projection, stacked into one matrix."""
    return ModuleRule(stored, (layers,))


def modulation(name: str, *, parts: int) -> ModuleRule:
    """An adaptive norm's linear for a runtime that reads all `parts` vectors of a channel at once.

    Parts come as (shift, scale, gate) once or twice; the scales, parts 1 and `parts - 2`, are used as 1 + scale.
    """
    return ModuleRule(name, ((name,),), order=Interleaved(parts), one_plus=tuple(sorted({1, parts - 2})))


@dataclass(frozen=True, slots=True)
class KeptRule:
    """A tensor that stays at 16 bits under another name, or stacked with others."""

    stored: str
    sources: tuple[str, ...]
    order: RowOrder = STACKED
    channels_last: bool = False  # a convolution's (N, C, H, W) is stored as (N, H, W, C)


def kept(stored: str, source: str, *, order: RowOrder = STACKED) -> KeptRule:
    """One tensor under another name."""
    return KeptRule(stored, (source,), order)


def kept_linear(stored: str, source: str, *, order: RowOrder = STACKED) -> tuple[KeptRule, KeptRule]:
    """Weight and bias of a linear under another name."""
    return (
        kept(f"{stored}.weight", f"{source}.weight", order=order),
        kept(f"{stored}.bias", f"{source}.bias", order=order),
    )


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One stack of repeated blocks: `stack` in the model, `stored` in the file."""

    stack: str
    stored: str
    modules: tuple[ModuleRule, ...]
    kept: tuple[KeptRule, ...] = ()


@dataclass(frozen=True, slots=True)
class ComfyArgument:
    """An argument of ComfyUI's model class: the config's value, or the product of several, over `divisor`."""

    name: str
    keys: tuple[str, ...]
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class Marker:
    """An empty tensor by whose name the runtime tells a variant: there where the config's `value` is true."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """How one family is stored in one format. Tensors that no rule names keep their names, unless `names_all`."""

    family: str
    format: str
    blocks: tuple[BlockLayout, ...]
    kept: tuple[KeptRule, ...] = ()  # outside of blocks
    names_all: bool = False  # the runtime renames everything: a tensor without a rule is an error
    dialect: Literal["python", "engine"] = "python"  # which of the runtime's two spellings of tensor names
    always_bias: bool = False  # the runtime wants a bias in every W4A4 module
    row_scales: bool = False  # the runtime wants an outer scale per row in every nvfp4 module
    pads: bool = False  # the runtime knows the true sizes and reads matrices padded to whole tiles
    runtime_class: str | None = None  # the runtime's name for the model class
    sglang: bool = False  # SGLang loads the file too, if its name says precision and rank
    markers: tuple[Marker, ...] = ()
    comfy_class: str | None = None  # ComfyUI's name, where its nodes build the model from the file alone
    comfy_constants: tuple[
        tuple[str, object], ...
    ] = ()  # what it builds it with that is the same for all sizes
    comfy_arguments: tuple[ComfyArgument, ...] = ()  # ... and what follows from the config
