"""GGUF files: read through the `gguf` package, each tensor dequantized when it is asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.source.classes import shapes_of
from svdq_cli.source.model import Source
from svdq_cli.source.single_file import source_of_file
from svdq_cli.source.tensors import TensorEntry
from svdq_cli.source.upconverted import Readable, is_no_weight
from svdq_cli.storage.headers import damaged
from svdq_cli.storage.tensor_file import DTYPE_OF_NAME

if TYPE_CHECKING:
    from gguf import GGUFReader

_PLAIN = {name: DTYPE_OF_NAME[name] for name in ("F32", "F16", "BF16", "F64")}
_SIXTEEN_BIT = ("F16", "BF16")
_WHOLE_NUMBERS = ("I8", "I16", "I32", "I64")
_CONVOLUTION_3D = 5  # axes
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors that were reshaped to fit a quantization block


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file, dequantized to float32 (which holds every GGUF value); 16-bit ones stay as they are."""

    file: Path
    origin: str
    shape: tuple[int, ...]
    kind: str  # F16, Q8_0, Q4_K, ...

    @property
    def dtype(self) -> str:
        return self.kind if self.kind in (*_SIXTEEN_BIT, *_WHOLE_NUMBERS) else "F32"

    def read(self) -> Tensor:
        return self._values().reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Dequantizes only these rows where the file keeps them apart. Of any shape."""
        stored = _stored(self.file, self.origin)
        if len(stored.data) != self.shape[0]:
            return self.read()[start:stop]
        return self._values(start, stop).reshape(-1, *self.shape[1:])

    def _values(self, start: int = 0, stop: int | None = None) -> Tensor:
        import numpy
        from gguf.quants import dequantize

        stored = _stored(self.file, self.origin)
        data = numpy.array(stored.data[start:stop])  # a copy: the file stays mapped read-only
        if self.kind in _PLAIN:
            plain = torch.from_numpy(data.view(numpy.uint8)).view(_PLAIN[self.kind])
            return plain if self.kind in _SIXTEEN_BIT else plain.float()
        return torch.from_numpy(dequantize(data, stored.tensor_type))


def open_gguf(path: Path, *, base: Path | None = None) -> Source:
    """Index a GGUF file. Raises InputError: damaged, of a kind that can't be dequantized, or not a known model;
    EnvironmentLacksError where the `gguf` package is missing."""
    reader = _reader(path)
    tensors = {
        stored.name: GgufTensor(path, stored.name, _shape(reader, stored), stored.tensor_type.name)
        for stored in reader.tensors
    }
    source = source_of_file(path, tensors, _dequantized, base=base, kind="GGUF")
    wanted = shapes_of(source.config, where=str(path))
    unfolded = {name: _unfolded(entry, wanted.get(name)) for name, entry in source.tensors.items()}
    return replace(source, tensors=unfolded)


def _unfolded(entry: TensorEntry, wanted: tuple[int, ...] | None) -> TensorEntry:
    """A tensor with the axes that its model's has. stable-diffusion.cpp writes no first axis of 1; and of a 3D
    convolution, which has an axis more than GGUF knows, the first two as one."""
    if wanted is None or not isinstance(entry, GgufTensor):
        return entry
    with_ones = (1,) * (len(wanted) - len(entry.shape)) + entry.shape
    folded = (wanted[0] * wanted[1], *wanted[2:]) if len(wanted) == _CONVOLUTION_3D else None
    return replace(entry, shape=wanted) if wanted == with_ones or entry.shape == folded else entry


def _dequantized(path: Path, stored: Mapping[str, GgufTensor]) -> Readable:
    """The tensors of a GGUF file as they are read. Raises InputError for a kind that can't be dequantized."""
    no_weights = tuple(name for name, entry in stored.items() if is_no_weight(name, entry))
    tensors = {name: entry for name, entry in stored.items() if name not in no_weights}
    for entry in tensors.values():
        _require_readable(path, _stored(path, entry.origin))
    kinds = Counter(entry.kind for entry in tensors.values())
    quantized = {kind: count for kind, count in kinds.items() if kind not in _PLAIN}
    return Readable(tensors, _warning(path, quantized), no_weights)


@lru_cache(maxsize=2)
def _reader(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise EnvironmentLacksError(
            f"{path} is a GGUF file, but the gguf package is not installed",
            hint='pip install gguf, or pip install "svdq[gguf]"',
            where=str(path),
        ) from error
    try:
        return GGUFReader(path)
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
    ) as error:  # what the package raises at a short file
        raise damaged(path, f"not a readable GGUF file ({error})") from error


@lru_cache(maxsize=2)
def _by_name(path: Path) -> Mapping[str, Any]:
    return {tensor.name: tensor for tensor in _reader(path).tensors}


def _stored(path: Path, name: str) -> Any:
    return _by_name(path)[name]


def _shape(reader: GGUFReader, stored: Any) -> tuple[int, ...]:
    """torch's order of sizes: GGUF has the innermost first."""
    sizes = tuple(int(size) for size in reversed(stored.shape))
    field = reader.fields.get(_ORIGINAL_SHAPE + stored.name)
    if field is None:
        return sizes
    original = tuple(int(field.parts[index][0]) for index in field.data)
    return original if math.prod(original) == math.prod(sizes) else sizes


def _require_readable(path: Path, stored: Any) -> None:
    from gguf.quants import dequantize

    if stored.tensor_type.name in _PLAIN:
        return
    try:
        # a row; of a vector, which stable-diffusion.cpp quantizes where its name ends in "weight", all
        dequantize(stored.data[:1] if stored.data.ndim > 1 else stored.data, stored.tensor_type)
    except NotImplementedError as error:
        raise InputError(
            f"{path}: {stored.name} is stored as {stored.tensor_type.name}, which the gguf package can't dequantize",
            hint="use a Q4_0 to Q8_0, K-quant, F16 or BF16 file, or the 16-bit model",
            where=stored.name,
        ) from error


def _warning(path: Path, quantized: dict[str, int]) -> tuple[str, ...]:
    if not quantized:
        return ()
    kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(quantized.items()))
    return (
        f"{path}: quantized tensors ({kinds}) were dequantized; the precision they lost is not restored, "
        "so prefer the 16-bit model if there is one",
    )
