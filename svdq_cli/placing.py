"""Where outputs may stand: seen before the work, so that hours later nothing but a full disk can be in the way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from svdq_cli.errors import UsageError
from svdq_cli.writing import REPORT_FILE, disk_errors

MAX_NAME_BYTES = 200  # file systems allow 255, and the partial name is longer than the final one
_OTHER = "choose another place with -o"


def require_places(
    outputs: Sequence[Path], *, folders: Sequence[bool], inputs: Sequence[Path], overwrite: bool
) -> None:
    """UsageError for an output that can't be written, or whose writing would destroy something else.

    `folders`: which of the outputs are folders. `inputs`: files and folders that the conversion reads.
    """
    for index, (path, is_folder) in enumerate(zip(outputs, folders, strict=True)):
        with disk_errors(path):
            try:
                _require_name(path)
                _require_apart(path, inputs, "is read by this conversion")
                _require_apart(path, outputs[:index], "is another output")
                if overwrite:
                    _require_replaceable(path, is_folder=is_folder)
                _require_writable(path)
            except OSError as error:
                raise UsageError(
                    f"{path}: can't write there: {error.strerror}", hint=_OTHER, where=str(path)
                ) from error


def _require_name(path: Path) -> None:
    name = path.name or str(path)
    if (
        "\0" in str(path)
        or name in (".", "..")
        or len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES
    ):
        raise UsageError(
            f"{path}: no name for an output (one of at most {MAX_NAME_BYTES} bytes is)",
            hint=_OTHER,
            where=str(path),
        )


def _require_apart(path: Path, others: Sequence[Path], what: str) -> None:
    """Neither the same, nor one inside the other, whatever links lead there."""
    own = Path(os.path.realpath(path))  # Path.resolve refuses circles
    for other in others:
        there = Path(os.path.realpath(other))
        if own == there or own in there.parents or there in own.parents:
            raise UsageError(
                f"{path}: would be written into or over {other}, which {what}", hint=_OTHER, where=str(path)
            )


def _require_replaceable(path: Path, *, is_folder: bool) -> None:
    """`--overwrite` replaces outputs of svdq: not a folder of someone's own, nor a folder by a file."""
    if path.is_dir() and not (is_folder and _is_output_folder(path)):
        raise UsageError(
            f"{path}: a folder that svdq has not written, which --overwrite does not replace",
            hint="remove it yourself, or choose another place with -o",
            where=str(path),
        )


def _is_output_folder(path: Path) -> bool:
    return (path / REPORT_FILE).is_file() or not any(path.iterdir())


def _require_writable(path: Path) -> None:
    parent = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not parent.is_dir():
        raise UsageError(f"{path}: can't write there: {parent} is no folder", hint=_OTHER, where=str(path))
    with tempfile.TemporaryDirectory(dir=parent, prefix=".svdq-probe-"):
        pass
