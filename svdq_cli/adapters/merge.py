"""LoRAs merged into a source: weights stay on disk, and each is changed when it is read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, zeros_like

from svdq_cli.adapters.denoiser import LoraFile, denoisers_left, read_lora
from svdq_cli.adapters.names import ModelShapes
from svdq_cli.adapters.read import Adapter, StoredChange
from svdq_cli.adapters.updates import WeightChange
from svdq_cli.errors import InputError
from svdq_cli.source.model import Source
from svdq_cli.source.tensors import ChangedTensor, TensorEntry

_LAST = threading.local()  # the tensor that a thread has read rows of last, and its changes


@dataclass(frozen=True, slots=True, eq=False)
class MergedTensor(ChangedTensor):
    """A tensor plus what adapters add to it, each times its strength, in float32: rounding to 16 bits would lose what a
    small update adds. Every change is that of the tensor as it was, so that their order says nothing."""

    changes: tuple[tuple[StoredChange | Tensor, float], ...]  # a Tensor: of a bias or a norm
    model: Mapping[str, TensorEntry]  # every tensor as it was

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        before = self.entry.read_rows(start, stop).float()
        added = zeros_like(before)
        for change, strength in self._changes():
            if isinstance(change, Tensor):
                added += strength * change[start:stop]
            else:
                of_rows = change.of_rows([(start, stop)])
                added += (strength * of_rows.added_to(before.flatten(1))).reshape(before.shape)
        return before + added

    def _rows_of(self, name: str, start: int, stop: int) -> Tensor:
        entry = self.model[name]
        return (entry.entry if isinstance(entry, MergedTensor) else entry).read_rows(start, stop)

    def _changes(self) -> Sequence[tuple[WeightChange | Tensor, float]]:
        """The changes of a tensor, kept until the thread asks for another tensor's: a matrix is read some rows at a
        time, and LoKr's factors take as long to make as the rest of it."""
        if getattr(_LAST, "tensor", None) is not self:
            _LAST.tensor = _LAST.changes = None
            _LAST.changes = [
                (change if isinstance(change, Tensor) else change.read(self._rows_of), strength)
                for change, strength in self.changes
            ]
            _LAST.tensor = self
        return _LAST.changes


def shapes_of(source: Source) -> ModelShapes:
    """What an adapter for this source must fit."""
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    name = str(source.config.get("_class_name", source.path))
    return ModelShapes(source.path, name, shapes, source.component, source.components[1:])


def merge_loras(source: Source, loras: Sequence[LoraFile]) -> Source:
    """The source with LoRAs merged, in this order. Raises as `read_lora` does."""
    if not loras:
        return source
    if not source.tensors:
        raise InputError(
            f"{source.path}: no weights to merge a LoRA into",
            hint="give the model's folder or file",
            where=str(source.path),
        )
    tensors = dict(source.tensors)
    warnings = list(source.warnings)
    model = shapes_of(source)
    adapters = [read_lora(lora, model) for lora in loras]
    for lora, adapter in zip(loras, adapters, strict=True):
        warnings += adapter.warnings
        for name, change in (*adapter.weights.items(), *adapter.vectors.items()):
            tensors[name] = _merged(adapter, source.tensors, tensors, name, change, lora.weight)
    return replace(
        source,
        tensors=tensors,
        warnings=(*warnings, *denoisers_left(source.components, adapters)),
        kind=f"{source.kind}, {len(loras)} LoRA{'s' if len(loras) > 1 else ''} merged",
        merged_into=[adapter.component for adapter in adapters],
    )


def _merged(
    adapter: Adapter,
    model: Mapping[str, TensorEntry],
    tensors: Mapping[str, TensorEntry],
    name: str,
    change: StoredChange | Tensor,
    weight: float,
) -> MergedTensor:
    entry = tensors.get(name)
    if entry is None:  # weights are known to be there
        raise InputError(
            f"{adapter.path}: it changes {name}, but the model has no bias there",
            hint="the LoRA was trained on a variant of the model",
            where=name,
            kind="lora-mismatch",
        )
    if isinstance(entry, MergedTensor):
        return MergedTensor(entry.entry, (*entry.changes, (change, weight)), model)
    return MergedTensor(entry, ((change, weight),), model)
