"""What a file holds: its quantized modules, the layers whose numbers each of them has, and its 16-bit tensors.

A stored module is one layer under its own name, several stacked by rows (a fused q, k, v), or some columns of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from svdq_cli.families.layouts.layout import STACKED, RowOrder
from svdq_cli.formats.contract import PLAIN, LayoutTraits
from svdq_cli.pack.padding import round_up
from svdq_cli.planning.joint import with_name
from svdq_cli.records import LayerPlan
from svdq_cli.source import by_component
from svdq_cli.storage.tensor_file import TensorSpec

TILE = 128  # rows and columns of the padded matrices that the engine reads


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One quantized module of a file and the layers whose numbers it holds."""

    plan: LayerPlan  # under its stored name: its sizes, precision and rank in the file
    branches: tuple[tuple[LayerPlan, ...], ...]  # by shared down projection, in the order of their rows
    order: RowOrder = STACKED
    columns: tuple[int, int] | None = None  # of the layer's columns; None for all
    carries_bias: bool = True  # False for all but the last part of a layer that is cut by columns
    one_plus: tuple[int, ...] = ()  # blocks of `Interleaved` whose bias is stored one larger
    pads: bool = False
    traits: LayoutTraits = PLAIN

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for branch in self.branches for layer in branch)

    def rows_of(self, layer: LayerPlan) -> int:
        """How many rows the layer has in this module, padding included."""
        rows = layer.linear.out_features
        return padded(rows) if self.pads else rows


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A stored 16-bit tensor: the model's tensors under one another, their rows in `order`; or the matrices (N, K) of
    `experts`, stored as one (E, K, N)."""

    sources: tuple[str, ...]
    order: RowOrder = STACKED
    channels_last: bool = False
    experts: bool = False


EMPTY = TensorSpec((0,), torch.float32)  # of a marker


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Everything a file holds."""

    modules: tuple[StoredModule, ...]
    kept: Mapping[str, KeptTensor]  # by stored name
    _parts: dict[str, tuple[StoredModule, ...]] = field(
        default_factory=dict[str, tuple[StoredModule, ...]], init=False, compare=False
    )

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The layers of the model that the file holds in 4 bits, each once."""
        return tuple({layer.name: layer for module in self.modules for layer in module.layers}.values())

    def parts_of(self, layer: str) -> tuple[StoredModule, ...]:
        """The modules that hold a layer, in the order of its columns."""
        if not self._parts:  # a model of experts has thousands of layers
            for module in self.modules:
                for plan in module.layers:
                    self._parts[plan.name] = (*self._parts.get(plan.name, ()), module)
        return self._parts.get(layer, ())


def kept_shapes(file: FileLayout, state: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file stores at 16 bits, by stored name. `state`: the model's tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in file.kept.items():
        shapes = [state[source] for source in tensor.sources]
        if tensor.experts:
            found[name] = (len(shapes), *reversed(shapes[0]))
            continue
        rest = shapes[0][1:]
        if tensor.channels_last:
            rest = (*rest[1:], rest[0])
        joined = (sum(shape[0] for shape in shapes),) if shapes[0] else ()
        found[name] = (*joined, *rest)
    return found


def joined_files(files: Sequence[FileLayout]) -> FileLayout:
    """Files of one pipeline as one, whose names must differ."""
    return FileLayout(
        tuple(module for file in files for module in file.modules),
        {name: tensor for file in files for name, tensor in file.kept.items()},
    )


def with_prefix(file: FileLayout, prefix: str) -> FileLayout:
    """The file's layout with a prefix before all names, stored ones and the model's."""

    def branch(layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
        return tuple(with_name(layer, prefix + layer.name) for layer in layers)

    if not prefix:
        return file
    modules = tuple(
        replace(
            module,
            plan=with_name(module.plan, prefix + module.name),
            branches=tuple(map(branch, module.branches)),
        )
        for module in file.modules
    )
    kept = {
        prefix + name: replace(tensor, sources=tuple(prefix + source for source in tensor.sources))
        for name, tensor in file.kept.items()
    }
    return FileLayout(modules, kept)


def files_of(file: FileLayout, components: Sequence[str]) -> dict[str, FileLayout]:
    """The file of every denoiser, stored under its own names; the model's names stay the joint ones."""
    modules = by_component(components, {module.name: module for module in file.modules})
    kept = by_component(components, file.kept)
    return {
        component: FileLayout(
            tuple(
                replace(module, plan=with_name(module.plan, name))
                for name, module in modules[component].items()
            ),
            kept[component],
        )
        for component in components
    }


def padded(size: int) -> int:
    """Rounded up to whole tiles."""
    return round_up(size, TILE)
