"""LoRAs merged into a source: weights stay on disk, and each is changed when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source.adapters import LowRankUpdate, read_adapter
from svdq_cli.source.model import Source
from svdq_cli.source.tensors import TensorEntry


@dataclass(frozen=True, slots=True, eq=False)
class MergedTensor:
    """A weight plus low-rank updates, in float32: rounding to 16 bit would lose what a small update adds."""

    entry: TensorEntry
    updates: tuple[LowRankUpdate, ...]

    @property
    def file(self) -> Path:
        return self.entry.file

    @property
    def origin(self) -> str:
        return self.entry.origin

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        return "F32"

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        weight = self.entry.read_rows(start, stop).float()
        for update in self.updates:
            difference = update.up[start:stop].float() @ update.down.float()
            weight = weight + (update.scale * difference).reshape(weight.shape)
        return weight


def merge_loras(source: Source, loras: Sequence[tuple[Path, float]]) -> Source:
    """The source with LoRAs (file, weight) merged, in this order. Raises InputError as `read_adapter` does."""
    if not loras:
        return source
    if not source.tensors:
        raise InputError(
            f"{source.path}: there are no weights here to merge a LoRA into",
            hint="give the model's folder or file",
            where=str(source.path),
        )
    tensors = dict(source.tensors)
    warnings = list(source.warnings)
    for path, weight in loras:
        adapter = read_adapter(path, weight=weight, source=source)
        warnings += adapter.warnings
        for name, update in adapter.updates.items():
            entry = tensors[name]
            before = entry.updates if isinstance(entry, MergedTensor) else ()
            tensors[name] = MergedTensor(source.tensors[name], (*before, update))
    kind = f"{source.kind}, {len(loras)} LoRA{'s' if len(loras) > 1 else ''} merged"
    return replace(source, tensors=tensors, warnings=tuple(warnings), kind=kind, is_saved_pipeline=False)
