"""JSON files, read with care."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from svdq_cli.errors import InputError, first_line

_JSON_LIMIT = 64 << 20  # bytes of a config or a shard index; the largest tokenizer.json has 20 MiB


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file. Raises InputError."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError(f"larger than {_JSON_LIMIT >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not readable JSON: {first_line(error)}", hint="restore the file", where=str(path)
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object", hint="restore the file", where=str(path))
    return MappingProxyType(value)
