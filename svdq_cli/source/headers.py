"""safetensors headers and JSON files, read with care: a damaged or foreign file is named before a weight is read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from svdq_cli.errors import InputError
from svdq_cli.source.tensors import DTYPE_BYTES, StoredTensor

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors specification's own bound
_PICKLE_MAGICS = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))  # zipped, or bare
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone, checked against the file's size."""
    return dict(read_whole_header(path).tensors)


def read_whole_header(path: Path) -> Header:
    """Tensors and metadata of one safetensors file. Raises InputError for anything else, by name."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise damaged(path, "shorter than a safetensors header")
            if prefix.startswith(_PICKLE_MAGICS) and file.read(1) != b"{":
                raise pickled(path)
            file.seek(8)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_HEADER_LIMIT, size - 8):
                raise damaged(path, "its header is longer than the file; it is truncated or not safetensors")
            header = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(path, f"unreadable header ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _entry(path, name, facts, size - 8 - length) for name, facts in header.items()}
    return Header(tensors, metadata if isinstance(metadata, dict) else {})


def tensor_offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins, in bytes from the file's start. The header is known to be sound
    (`read_whole_header`)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: 8 + length + int(facts["data_offsets"][0])
        for name, facts in header.items()
        if name != "__metadata__"
    }


def is_gguf(path: Path) -> bool:
    """GGUF by its first bytes, whatever the file is called."""
    with path.open("rb") as file:
        return file.read(4) == _GGUF_MAGIC


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not readable JSON: {error}", hint="restore the file", where=str(path)
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object", hint="restore the file", where=str(path))
    return MappingProxyType(value)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content (hashlib.file_digest needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
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


def _entry(path: Path, name: str, facts: object, available: int) -> StoredTensor:
    try:
        if not isinstance(facts, dict):
            raise TypeError
        entry = StoredTensor(path, name, tuple(int(n) for n in facts["shape"]), str(facts["dtype"]))
        begin, end = (int(n) for n in facts["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"the header entry of {name!r} is malformed") from error
    if not 0 <= begin <= end <= available:
        raise damaged(path, f"{name!r} reaches beyond the end of the file; it is truncated")
    if entry.dtype in DTYPE_BYTES and math.prod(entry.shape) * DTYPE_BYTES[entry.dtype] != end - begin:
        raise damaged(path, f"the size of {name!r} disagrees with its shape")
    return entry
