"""Tensors whose numbers are known already: biases that means were moved into, a last linear that was fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from svdq_cli.source.model import Source, tensor_entry
from svdq_cli.source.tensors import ChangedTensor


@dataclass(frozen=True, slots=True, eq=False)
class ShiftedTensor(ChangedTensor):
    """A source's tensor with `values` (float32, of its shape) in its place."""

    values: Tensor

    def read(self) -> Tensor:
        return self.values

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]


def with_values(source: Source, values: Mapping[str, Tensor]) -> Source:
    """The source with other numbers in some of its tensors, each float32 and of the tensor's shape."""
    if not values:
        return source
    tensors = {name: ShiftedTensor(tensor_entry(source, name), value) for name, value in values.items()}
    return replace(source, tensors={**source.tensors, **tensors})
