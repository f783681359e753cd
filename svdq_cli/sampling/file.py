"""`svdq_sampling.json`: how a model is sampled, in its own folder. For models whose configs do not tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from svdq_cli.errors import InputError
from svdq_cli.source import Source
from svdq_cli.storage.json_files import read_json

SAMPLING_FILE = "svdq_sampling.json"
_PROMPT_LIST = re.compile(r"calib_prompts/[\w-]+\.txt")  # ships with svdq: no file of this machine is named


def stored_sampling(source: Source) -> Mapping[str, object] | None:
    """The fields of a `ModelSampling` that the model's folder names; None where it has no such file.

    Raises InputError for an unknown key and for a value out of bounds.
    """
    path = source.pipeline / SAMPLING_FILE if source.pipeline else None
    if path is None or not path.is_file():
        return None
    said = {key: value for key, value in read_json(path).items() if key != "schema"}
    for key, value in said.items():
        if key not in _FIELDS or not _FIELDS[key](value):
            raise InputError(
                f"{path}: {key}: {str(value)[:80]!r} can't be read",
                hint="restore the file, or remove it to sample according to the model's configs",
                where=str(path),
            )
    missing = [key for key in ("steps", "guidance") if key not in said]
    if missing:
        raise InputError(
            f"{path}: {missing[0]} is missing", hint="restore the file, or remove it", where=str(path)
        )
    return said


def _whole(low: int, high: int, multiple: int = 1) -> Callable[[object], bool]:
    def is_one(value: object) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and low <= value <= high and value % multiple == 0  # type: ignore[operator]

    return is_one


def _is_scale(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1000  # type: ignore[arg-type,operator]


def _is_list(value: object) -> bool:
    return isinstance(value, str) and _PROMPT_LIST.fullmatch(value) is not None


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 2000 and value.isprintable()


_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "height": _whole(8, 1 << 14, 8),
    "width": _whole(8, 1 << 14, 8),
    "steps": _whole(1, 1000),
    "guidance": _is_scale,
    "true_cfg": _is_scale,
    "max_sequence_length": _whole(1, 1 << 14),
    "batch_size": _whole(1, 1024),
    "samples": _whole(1, 100_000),
    "prompts": _is_list,
    "held_out_prompts": _is_list,
    "example_prompt": _is_prompt,
}
