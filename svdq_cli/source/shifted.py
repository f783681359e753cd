"""A tensor whose numbers are known already: a bias that means were moved into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svdq_cli.source.tensors import ChangedTensor


@dataclass(frozen=True, slots=True, eq=False)
class ShiftedTensor(ChangedTensor):
    """A source's tensor with `values` (float32, of its shape) in its place."""

    values: Tensor

    def read(self) -> Tensor:
        return self.values

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]
