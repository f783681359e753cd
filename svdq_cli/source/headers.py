"""safetensors headers and JSON files, read with care: a damaged or foreign file is named before a weight is read."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.source.tensors import DTYPE_BYTES, HASHED_AT_ONCE, StoredTensor
from svdq_cli.storage.headers import damaged, header_json

_BITS = {  # a value; those that svdq does not read too, for it names them when it refuses them
    **{dtype: 8 * size for dtype, size in DTYPE_BYTES.items()},
    **{"C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone, checked against the file's size."""
    return dict(read_whole_header(path).tensors)


def read_whole_header(path: Path, *, at: tuple[int, int] | None = None) -> Header:
    """Tensors and metadata of one safetensors file. Raises InputError for anything else, by name.

    `at`: where it begins and how many bytes it has, inside of an archive that stores it as it is.
    """
    header, begin, size = header_json(path, at)
    # MLX writes null where it has none, and safetensors' own reader takes that for none
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a JSON object of texts")
    entries = {name: _entry(path, name, facts, begin) for name, facts in header.items()}
    _require_no_gaps(path, entries, size)
    return Header({name: entry for name, (entry, _) in entries.items()}, metadata)


def is_gguf(path: Path) -> bool:
    """GGUF by its first bytes, whatever the file is called."""
    with path.open("rb") as file:
        return file.read(4) == _GGUF_MAGIC


def file_sha256(*paths: Path, stop: threading.Event | None = None) -> str:
    """sha256 of the files' content, one after the other (hashlib.file_digest needs Python 3.11). CancelledError once
    `stop` is set."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(HASHED_AT_ONCE))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(block):
                if stop is not None and stop.is_set():
                    raise CancelledError
                digest.update(block[:read])
    return digest.hexdigest()


def _entry(path: Path, name: str, facts: object, start: int) -> tuple[StoredTensor, tuple[int, int]]:
    """A tensor, and where its bytes begin and end in the data, which starts at byte `start` of the file."""
    try:
        if not isinstance(facts, dict) or not isinstance(facts["dtype"], str):
            raise TypeError
        name.encode()  # half of a character is not a name
        shape, offsets = (tuple(_size(n) for n in facts[key]) for key in ("shape", "data_offsets"))
        begin, end = offsets
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"the header entry of {name!r} is malformed") from error
    entry = StoredTensor(path, name, shape, facts["dtype"], start + begin)
    if entry.dtype not in _BITS:
        raise damaged(path, f"{name!r} has the dtype {entry.dtype!r}, which safetensors does not have")
    if math.prod(shape) * _BITS[entry.dtype] != 8 * (end - begin):
        raise damaged(path, f"the size of {name!r} disagrees with its shape")
    return entry, (begin, end)


def _size(value: object) -> int:
    # what torch and files count with; of nothing, a tensor of shape (0, 2**64) would have the right size
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError
    return value


def _require_no_gaps(
    path: Path, entries: Mapping[str, tuple[StoredTensor, tuple[int, int]]], available: int
) -> None:
    """Tensors follow one another and fill the file, as the format demands: none overlaps, nothing hides between."""
    for name, (_, (_, end)) in entries.items():
        if end > available:
            raise damaged(path, f"{name!r} reaches beyond the end of the file; it is truncated")
    last = 0
    for name, (_, (begin, end)) in sorted(entries.items(), key=lambda item: item[1][1]):
        if begin != last or end < begin:
            raise damaged(
                path, f"the bytes of {name!r} overlap with another tensor's or leave a gap before them"
            )
        last = end
    if last != available:
        raise damaged(path, f"{available - last} bytes at its end belong to no tensor")
