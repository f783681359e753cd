"""A tensor whose numbers are known already: a bias that means were moved into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from svdq_cli.source.tensors import TensorEntry


@dataclass(frozen=True, slots=True, eq=False)
class ShiftedTensor:
    """A source's tensor with `values` (float32, of its shape) in its place."""

    entry: TensorEntry
    values: Tensor

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
        return self.values

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]
