"""safetensors files tensor by tensor. Written: the header comes first, then every tensor goes to its own place.

The bytes are those of safetensors' own `save_file`, with the metadata in order, so that no more than one tensor has to
be in memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# In the order of safetensors' own enumeration; a file holds the last of them first, so that all are aligned.
_DTYPES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
DTYPE_OF_NAME: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _DTYPES.items()}
_RANK = {dtype: index for index, dtype in enumerate(_DTYPES)}
_ALIGNMENT = 8  # of the first tensor, in bytes
_COPY_BYTES = 1 << 24  # read at once when a tensor is copied


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor before its numbers exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class TensorWriter:
    """Takes the tensors of one file, in any order, each once."""

    _file: BinaryIO
    _specs: Mapping[str, TensorSpec]
    _offsets: Mapping[str, int]  # from the start of the file
    _written: set[str] = field(default_factory=set[str])

    def write(self, name: str, tensor: Tensor) -> None:
        """ValueError for a tensor that the header does not announce so, or that is there already. `tensor` is of any
        shape."""
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if self._specs.get(name) != found or name in self._written:
            raise ValueError(f"{name}: {found}, announced {self._specs.get(name)}, or written twice")
        self._written.add(name)
        self._file.seek(self._offsets[name])
        self._file.write(bytes_of(tensor).numpy().data)

    def copy(self, name: str, source: Path, begin: int) -> None:
        """A tensor whose bytes are stored in another file, `begin` bytes from its start, as they are."""
        if name not in self._specs or name in self._written:
            raise ValueError(f"{name}: not announced, or written twice")
        self._written.add(name)
        self._file.seek(self._offsets[name])
        left = self._specs[name].bytes
        with source.open("rb", buffering=0) as file:
            file.seek(begin)
            while left:
                block = file.read(min(left, _COPY_BYTES))
                if not block:
                    raise ValueError(f"{source}: ends within {name}")
                self._file.write(block)
                left -= len(block)

    @property
    def missing(self) -> list[str]:
        """What is announced and not written."""
        return sorted(self._specs.keys() - self._written)


@contextmanager
def write_tensors(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Generator[TensorWriter, None, None]:
    """A new file at `path` with this header. ValueError at the end for a tensor that was never written."""
    places = _places(specs)
    header = _header(specs, places, metadata)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.bytes for spec in specs.values()))
        writer = TensorWriter(file, specs, {name: len(header) + place for name, place in places.items()})
        yield writer
        if writer.missing:
            raise ValueError(f"{path}: {len(writer.missing)} tensors were not written: {writer.missing[0]}")


def file_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """The size of a file of `write_tensors`, header included."""
    return len(_header(specs, _places(specs), metadata)) + sum(spec.bytes for spec in specs.values())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """All at once, as `save_file` does, whose files no other user may read, whatever the umask says."""
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with write_tensors(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's memory, (bytes,) uint8 on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def read_at(path: Path, offset: int, into: Tensor) -> None:
    """Fill `into`, (bytes,) uint8, from a file. ValueError where the file ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        read_into(file, into)


def read_into(file: FileIO, into: Tensor) -> None:
    """Fill `into`, (bytes,) uint8, from the file's position. ValueError where it ends early."""
    left = into.numpy().data
    while left:
        count = file.readinto(left)
        if not count:
            raise ValueError(f"the file ends {len(left)} bytes too early")
        left = left[count:]


def _places(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Offsets behind the header, in the order in which the tensors are stored: by dtype, then by name."""
    places: dict[str, int] = {}
    offset = 0
    for name in sorted(specs, key=lambda name: (-_RANK[specs[name].dtype], name)):
        places[name] = offset
        offset += specs[name].bytes
    return places


def _header(specs: Mapping[str, TensorSpec], places: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The header's length and its JSON, padded with spaces, as the format allows."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, begin in places.items():
        spec = specs[name]
        entries[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.bytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % _ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded
