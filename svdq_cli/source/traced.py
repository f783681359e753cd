"""Stand-ins for tensors that remember which rows of which stored tensors they are.

A program that renames, splits, joins and reorders a state dict is run on stand-ins instead of tensors; what each of its
results consists of is then known exactly, and no weight was read. A stand-in does what keeps rows whole and nothing
else: any other operation is an error, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Rows `start` to `stop` of the stored tensor `key`."""

    key: str
    start: int
    stop: int


@dataclass(eq=False)  # one object for one value: splits are told apart by identity
class Traced:
    """A stand-in. `rows` in order; None for a part whose size its program got wrong (see `Splits`).

    `reshaped`: the elements of the rows, in another shape.
    """

    shape: Shape
    rows: tuple[RowsOf, ...] | None
    splits: list[tuple[Traced, tuple[Traced, ...]]]
    reshaped: bool = False

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = _FUNCTIONS.get(function)
        if found is None:
            raise TypeError(f"{getattr(function, '__name__', function)} does not keep rows whole")
        return found(*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def contiguous(self) -> Traced:
        return self

    def clone(self) -> Traced:
        return self

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
        if self.shape[0] % chunks:
            raise ValueError(f"{self.shape[0]} rows do not divide into {chunks} parts")
        return self._parts((self.shape[0] // chunks,) * chunks, dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Traced, ...]:
        if isinstance(sizes, int):
            return self.chunk(self.shape[0] // sizes, dim)
        parts = self._parts(tuple(sizes), dim)
        self.splits.append((self, parts))
        return parts

    def __getitem__(self, index: object) -> Traced:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.shape[0])
            if step == 1 and start <= stop:
                return self._between(start, stop)
        if isinstance(index, tuple) and len(index) == self.ndim:
            # Sizes of 1 are dropped, and one of them may be the first
            dropped = [item == 0 and size == 1 for item, size in zip(index, self.shape, strict=True)]
            whole = [item == slice(None) for item in index]
            if all(one or other for one, other in zip(dropped, whole, strict=True)):
                return self.reshape(
                    [size for size, drop in zip(self.shape, dropped, strict=True) if not drop]
                )
        raise TypeError(f"{index} does not keep rows whole")

    def reshape(self, *sizes: Any) -> Traced:
        wanted = [*sizes[0]] if len(sizes) == 1 and not isinstance(sizes[0], int) else [*sizes]
        count = math.prod(self.shape)
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted[wanted.index(-1)] = count // known if known > 0 else 0
        if math.prod(wanted) != count or min(wanted, default=1) < 0:
            raise ValueError(f"{list(self.shape)} is not {wanted}")
        return Traced(tuple(wanted), self.rows, self.splits, reshaped=True)

    view = reshape

    def _between(self, start: int, stop: int) -> Traced:
        return self._parts((start, stop - start, self.shape[0] - stop), 0)[1]

    def _parts(self, sizes: Shape, dim: int) -> tuple[Traced, ...]:
        """Parts of these sizes. Where the sizes are not those of this tensor, how many parts there are and in what
        order is known all the same."""
        if dim not in (0, -self.ndim) or self.reshaped or self.rows is None:
            raise TypeError("only whole rows are split")
        fits = sum(sizes) == self.shape[0] and min(sizes) >= 0
        ends = list(accumulate(sizes))
        return tuple(
            Traced((size, *self.shape[1:]), _cut(self.rows, end - size, end) if fits else None, self.splits)
            for size, end in zip(sizes, ends, strict=True)
        )


def _cut(rows: Sequence[RowsOf], start: int, stop: int) -> tuple[RowsOf, ...]:
    found: list[RowsOf] = []
    before = 0
    for part in rows:
        size = part.stop - part.start
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            found.append(RowsOf(part.key, part.start + first, part.start + last))
        before += size
    return tuple(found)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    first = tensors[0]
    if len(tensors) == 1:
        return first
    rows: list[RowsOf] = []
    for tensor in tensors:
        if tensor.rows is None or tensor.reshaped or tensor.shape[1:] != first.shape[1:]:
            raise TypeError("only whole rows are joined")
        rows += tensor.rows
    if dim not in (0, -first.ndim):
        raise TypeError("only whole rows are joined")
    return Traced((sum(t.shape[0] for t in tensors), *first.shape[1:]), tuple(rows), first.splits)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.concat: _cat,
    torch.chunk: lambda tensor, chunks, dim=0: tensor.chunk(chunks, dim),
    torch.split: lambda tensor, sizes, dim=0: tensor.split(sizes, dim),
    torch.reshape: lambda tensor, shape: tensor.reshape(shape),
}


def stand_ins(shapes: Mapping[str, Shape]) -> dict[str, Traced]:
    """A stand-in for each stored tensor."""
    splits: list[tuple[Traced, tuple[Traced, ...]]] = []
    return {
        key: Traced(shape, (RowsOf(key, 0, shape[0] if shape else 1),), splits)
        for key, shape in shapes.items()
    }


def fit_splits(results: Mapping[str, Traced], wanted: Mapping[str, Shape]) -> None:
    """Gives the parts of each split the sizes that the model has for them.

    A program may be written for the widths of one published model; how many parts a tensor has and in what order they
    lie is true of every width. Parts that are no result themselves keep the sizes that the program gave them.
    """
    names = {id(traced): name for name, traced in results.items()}
    for whole, parts in next(iter(results.values())).splits if results else ():
        sizes = [wanted.get(names.get(id(part), ""), (0,))[0] for part in parts]
        if whole.rows is None or sum(sizes) != whole.shape[0] or min(sizes) <= 0:
            continue
        for part, size, end in zip(parts, sizes, accumulate(sizes), strict=True):
            part.rows = _cut(whole.rows, end - size, end)
            part.shape = (size, *whole.shape[1:])
