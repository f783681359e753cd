"""safetensors headers and JSON files, read with care: a damaged or foreign file is named before a weight is read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from svdq_cli.errors import InputError, first_line
from svdq_cli.source.other_files import other_kind
from svdq_cli.source.tensors import DTYPE_BYTES, HASHED_AT_ONCE, StoredTensor

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors specification's own bound
_PICKLE_MAGICS = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))  # zipped, or bare
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
    header, begin, size = _header_json(path, at)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "its metadata is not a JSON object of texts")
    entries = {name: _entry(path, name, facts, begin) for name, facts in header.items()}
    _require_no_gaps(path, entries, size)
    return Header({name: entry for name, (entry, _) in entries.items()}, metadata)


def header_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file alone; empty where there is none or the file is something else."""
    try:
        header, _, _ = _header_json(path)
    except InputError:
        return {}
    found = header.get("__metadata__")
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in cast("dict[str, object]", found).items() if isinstance(value, str)}


def _header_json(path: Path, at: tuple[int, int] | None = None) -> tuple[dict[str, object], int, int]:
    """The header of a safetensors file, and where the tensors' data begin and how many bytes they have. InputError for
    anything else. `at`: see `read_whole_header`."""
    try:
        start, size = at or (0, path.stat().st_size)
        text = _header_text(path, start, size)
        header = json.loads(text, object_pairs_hook=_keys_once)
    except PermissionError as error:
        raise InputError(
            f"{path}: can't be read: {error.strerror}",
            hint="get read permission (chmod a+r), or copy it",
            where=str(path),
        ) from error
    # ValueError: not UTF-8, not JSON, a number without end
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"unreadable header ({first_line(error)})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    before = 8 + len(text)
    return cast("dict[str, object]", header), start + before, size - before


def _header_text(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        prefix = file.read(8)
        if len(prefix) < 8:
            if known := other_kind(prefix):
                kind, cure = known
                raise InputError(f"{path}: {kind}, not safetensors", hint=cure, where=str(path))
            raise damaged(path, "shorter than a safetensors header")
        if prefix.startswith(_PICKLE_MAGICS) and file.read(1) != b"{":
            raise pickled(path)
        file.seek(start + 8)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER_LIMIT, size - 8):
            if known := other_kind(prefix + file.read(56)):
                kind, cure = known
                raise InputError(f"{path}: {kind}, not safetensors", hint=cure, where=str(path))
            raise damaged(path, "its header is longer than the file; it is truncated or not safetensors")
        return file.read(length)


def _keys_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON leaves open which of two equal keys counts, and readers differ: such a file is one thing to a scanner and
    another to the runtime."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r} occurs twice")
    return found


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


def damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: damaged: {why}", hint="download the file again", where=str(path), kind="damaged-file"
    )


def pickled(path: Path) -> InputError:
    return InputError(
        f"{path}: this is a pickle (as in .ckpt, .pt and .bin files), not safetensors; loading it could run code",
        hint="get the model as safetensors, or convert it in a sandbox: "
        "safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)",
        where=str(path),
        kind="pickle",
    )


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
