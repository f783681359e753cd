"""The header of a safetensors file: bounded, strict, and what the file is instead where it is another."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import cast

from svdq_cli.errors import InputError, first_line

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors specification's own bound
_PICKLE_MAGICS = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))  # zipped, or bare
_MAGICS = (
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GIF8", "an image"),
    (b"RIFF", "an image or a sound"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an archive"),
    (b"7z\xbc\xaf", "an archive"),
)


def header_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file alone; empty where there is none or the file is something else."""
    try:
        header, _, _ = header_json(path)
    except InputError:
        return {}
    found = header.get("__metadata__")
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in cast("dict[str, object]", found).items() if isinstance(value, str)}


def header_json(path: Path, at: tuple[int, int] | None = None) -> tuple[dict[str, object], int, int]:
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


def other_kind(start: bytes) -> tuple[str, str] | None:
    """What a file is that begins so and is not a safetensors, and what to do; None where that can't be told."""
    model = "give a diffusers pipeline folder, or a .safetensors or .gguf file"
    if start.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer instead of the file",
            "fetch the file itself: `git lfs pull`, or `hf download`",
        )
    if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
        return "a web page instead of the file", "download the file again, from its download link"
    if kind := next((what for magic, what in _MAGICS if start.startswith(magic)), None):
        return kind, model
    text = start and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start)
    return ("a text file", model) if text else None
