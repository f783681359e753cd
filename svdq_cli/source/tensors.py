"""The tensors of a source: what each looks like once read, where it is stored, and how it gets from there to here.

Every kind of entry says its shape and dtype without touching the weights, and `read()` brings one tensor into memory.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.storage.tensor_file import DTYPE_OF_NAME, bytes_of, read_at, read_into

DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPE_OF_NAME.items()}
HASHED_AT_ONCE = 1 << 23  # bytes; with fewer, each block would wait again for other threads of Python
SIXTEEN_BIT_OR_MORE = ("F16", "BF16", "F32")


class TensorEntry(Protocol):
    """One tensor of a source, not yet read. `origin` is its key in `file`, for messages."""

    @property
    def file(self) -> Path: ...
    @property
    def origin(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str:
        """safetensors' name of the dtype that `read` returns: BF16, F16, F32, ..."""
        ...

    def read(self) -> Tensor:
        """Raises InputError when the file is damaged. Of any shape, `self.shape`."""
        ...

    def read_rows(self, start: int, stop: int) -> Tensor:
        """`read()[start:stop]`, without reading the rest where the file allows that. Of any shape but for the first
        axis."""
        ...


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating point tensor is NaN or infinite. Its extremes tell, forty times faster than
    asking every number. Of any shape."""
    if tensor.itemsize == 1:
        tensor = tensor.float()  # torch has no extremes of 8-bit floats
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def content_sha256(entry: TensorEntry) -> str:
    """sha256 of the tensor's bytes as it is read, some rows of a matrix at a time."""
    if isinstance(entry, StoredTensor):
        return entry.sha256()
    # rows of a slice are columns of what is stored: all of it would be read for each of its parts
    if len(entry.shape) < 2 or isinstance(entry, SliceTensor):
        return hashlib.sha256(bytes_of(entry.read()).numpy().data).hexdigest()
    # Less at a time than of what is only read: an adapter's changes take several times as much on their way.
    step = max(1, HASHED_AT_ONCE // 8 * entry.shape[0] // max(1, entry_bytes(entry)))
    digest = hashlib.sha256()
    for start in range(0, entry.shape[0], step):
        digest.update(bytes_of(entry.read_rows(start, start + step)).numpy().data)
    return digest.hexdigest()


def entry_bytes(entry: TensorEntry) -> int:
    """The size of a tensor once it is read."""
    return math.prod(entry.shape) * DTYPE_BYTES.get(entry.dtype, 0)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it is stored in a safetensors file."""

    file: Path
    origin: str
    shape: tuple[int, ...]
    dtype: str
    offset: int  # of its first byte, from the start of the file

    def read(self) -> Tensor:
        return self._read(self.shape, skip=0)

    def read_rows(self, start: int, stop: int) -> Tensor:
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        row = math.prod(self.shape[1:]) * DTYPE_BYTES.get(self.dtype, 0)
        return self._read((max(stop - start, 0), *self.shape[1:]), skip=start * row)

    def sha256(self) -> str:
        """sha256 of the stored bytes, some of them in memory at a time."""
        self._known_dtype()
        digest, left = hashlib.sha256(), entry_bytes(self)
        block = torch.empty(min(left, HASHED_AT_ONCE), dtype=torch.uint8)
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while left:
                    part = block[:left]
                    read_into(file, part)
                    digest.update(part.numpy().data)
                    left -= len(part)
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return digest.hexdigest()

    def _read(self, shape: tuple[int, ...], *, skip: int) -> Tensor:
        """Read into separate memory: pages of a mapped file would count as the process's, for as long as any is in
        use."""
        found = torch.empty(shape, dtype=self._known_dtype())
        try:
            read_at(self.file, self.offset + skip, bytes_of(found))
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return found

    def _known_dtype(self) -> torch.dtype:
        dtype = DTYPE_OF_NAME.get(self.dtype)
        if dtype is None:
            raise self._unreadable(f"svdq does not read the dtype {self.dtype}")
        return dtype

    def _unreadable(self, why: object) -> InputError:
        return InputError(
            f"{self.file}: can't read {self.origin}: {why}",
            hint="download the file again",
            where=str(self.file),
            kind="damaged-file",
        )


@dataclass(frozen=True, slots=True)
class DerivedTensor:
    """What is read from one other entry: of its file, key, shape and dtype where a subclass says nothing else."""

    entry: TensorEntry

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
        return self.entry.dtype


@dataclass(frozen=True, slots=True)
class Float8Tensor(DerivedTensor):
    """An 8-bit float, up-converted to bfloat16 (which holds every float8 value exactly), times its scale if it has one.

    The scale is one number, or one per output row.
    """

    entry: StoredTensor
    scale: StoredTensor | None

    @property
    def dtype(self) -> str:
        return "BF16"

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0]) if self.shape else self.entry.read().bfloat16()

    def read_rows(self, start: int, stop: int) -> Tensor:
        codes = self.entry.read_rows(start, stop)
        if self.scale is None:
            return codes.to(torch.bfloat16)
        return (codes.float() * self.scale_of_rows(start, stop)).to(torch.bfloat16)

    def scale_of_rows(self, start: int, stop: int) -> Tensor:
        """float32, of the number of axes that the rows have or none; 1 where there is no scale. Of any shape that the
        rows broadcast with."""
        if self.scale is None:
            return torch.ones((), dtype=torch.float32)
        scale = self.scale.read().float()
        if scale.numel() == 1:
            return scale.reshape(())
        return scale.reshape(-1, *[1] * (len(self.shape) - 1))[start:stop]


@dataclass(frozen=True, slots=True)
class Float64Tensor(DerivedTensor):
    """A 64-bit float, rounded to float32."""

    @property
    def dtype(self) -> str:
        return "F32"

    def read(self) -> Tensor:
        return self.entry.read().float()

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.entry.read_rows(start, stop).float()


@dataclass(frozen=True, slots=True, eq=False)
class ChangedTensor(DerivedTensor):
    """A tensor in the place of another of its shape, in float32, whose numbers a subclass gives."""

    @property
    def dtype(self) -> str:
        return "F32"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start` to `stop` of an entry's first dimension."""

    entry: TensorEntry
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RowsTensor:
    """Row ranges of stored tensors, one after the other: a part of a fused matrix, or one with its halves swapped."""

    parts: tuple[Rows, ...]

    @property
    def file(self) -> Path:
        return self.parts[0].entry.file

    @property
    def origin(self) -> str:
        return self.parts[0].entry.origin

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.stop - part.start for part in self.parts), *self.parts[0].entry.shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].entry.dtype

    def read(self) -> Tensor:
        return torch.cat([part.entry.read_rows(part.start, part.stop) for part in self.parts])

    def read_rows(self, start: int, stop: int) -> Tensor:
        found: list[Tensor] = []
        first, last, _ = slice(start, stop).indices(self.shape[0])
        before = 0  # rows of the parts that come earlier
        for part in self.parts:
            begin = part.start + max(first - before, 0)
            end = min(part.start + last - before, part.stop)
            if begin < end or (first >= last and not found):
                found.append(part.entry.read_rows(begin, max(begin, end)))
            before += part.stop - part.start
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class SliceTensor(DerivedTensor):
    """One matrix (N, K) out of a stack (E, K, N)."""

    index: int

    @property
    def origin(self) -> str:
        return f"{self.entry.origin}[{self.index}]"

    @property
    def shape(self) -> tuple[int, ...]:
        _, columns, rows = self.entry.shape
        return rows, columns

    def read(self) -> Tensor:
        """(N, K)."""
        return self.entry.read_rows(self.index, self.index + 1)[0].T.contiguous()

    def read_rows(self, start: int, stop: int) -> Tensor:
        """(rows, K). Rows are columns of what is stored, so that all of the matrix is read."""
        return self.read()[start:stop]
