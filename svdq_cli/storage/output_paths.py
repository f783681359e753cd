"""Where outputs may be written: checked before the work, so that hours later only a full disk can be in the way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from svdq_cli.errors import UsageError
from svdq_cli.storage.atomic import disk_errors
from svdq_cli.storage.images import WRITTEN_SUFFIXES
from svdq_cli.storage.json_files import read_json

REPORT_FILE = "svdq_report.json"
DEMO_REPORT = "report.json"
WEIGHTS_SUFFIX = ".safetensors"
MAX_NAME_BYTES = 200  # file systems allow 255, and the partial name is longer than the final one
_OTHER = "choose another path with -o"


def is_output_folder(path: Path) -> bool:
    """Whether svdq wrote this folder as the output of a conversion, or nothing is in it."""
    return (path / REPORT_FILE).is_file() or not any(path.iterdir())


def is_demo_folder(path: Path) -> bool:
    """Whether `svdq demo` wrote this folder, or nothing is in it."""
    report = path / DEMO_REPORT
    ours = report.is_file() and read_json(report).get("command") == "demo"
    return ours or not any(path.iterdir())


def require_places(
    outputs: Sequence[Path],
    *,
    folders: Sequence[bool],
    inputs: Sequence[Path],
    overwrite: bool,
    replaceable: Callable[[Path], bool] = is_output_folder,
) -> None:
    """UsageError for an output that can't be written, or whose writing would destroy something else.

    `folders`: which of the outputs are folders. `inputs`: files and folders that the command reads. `replaceable`:
    whether `overwrite` may replace a folder that exists.
    """
    for index, (path, is_folder) in enumerate(zip(outputs, folders, strict=True)):
        with disk_errors(path):
            try:
                require_name(path)
                _require_apart(path, inputs, "is read by this command")
                _require_apart(path, outputs[:index], "is another output")
                if overwrite and path.is_dir() and not (is_folder and replaceable(path)):
                    raise _not_ours(path)
                _require_writable(path)
            except OSError as error:
                raise UsageError(
                    f"{path}: can't write there: {error.strerror}", hint=_OTHER, where=str(path)
                ) from error


def name_warnings(outputs: Sequence[Path], *, folders: Sequence[bool]) -> tuple[str, ...]:
    """What a user is to know of outputs whose names say something else than they are. `folders`: which are folders."""
    found: list[str] = []
    for path, is_folder in zip(outputs, folders, strict=True):
        named_file = path.suffix.lower() == WEIGHTS_SUFFIX
        if is_folder and named_file:
            found.append(
                f"{path}: will be a folder, for diffusers; --format names the formats that are single files"
            )
        elif not is_folder and not named_file:
            found.append(
                f"{path}: programs find only files whose names end in {WEIGHTS_SUFFIX}; name it so with -o, or "
                "rename it"
            )
    return tuple(found)


def require_image_place(
    path: Path, *, inputs: Sequence[Path] = (), overwrite: bool, others: Sequence[str] = ()
) -> None:
    """UsageError for an image of an unknown type, or one that can't be written there. `others`: more types that it may
    have."""
    if path.suffix.lower() not in (*WRITTEN_SUFFIXES, *others):
        more = "; .mp4 for a video, .wav for a sound" if others else ""
        raise UsageError(
            f"{path}: unknown image type", hint=f"name the output .png, .jpg or .webp{more}", where=str(path)
        )
    require_places([path], folders=[False], inputs=inputs, overwrite=overwrite)


def require_type(path: Path, suffixes: Sequence[str], what: str, *, hint: str = "") -> None:
    """UsageError for a file type that can't hold `what` a model generates. `hint`: what else would do."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{path}: this model generates {what}, but such a file can't hold it",
            hint=f"name the output {', '.join(dict.fromkeys(suffixes))}{hint}",
            where=str(path),
        )


def require_name(path: Path) -> None:
    """UsageError for a path that can't be an output's: `.`, `/`, a name too long for a file system."""
    name = path.name
    if "\0" in str(path) or name in ("", "..") or len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        raise UsageError(
            f"{path}: not a valid output name (at most {MAX_NAME_BYTES} bytes)",
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


def _not_ours(path: Path) -> UsageError:
    """`--overwrite` replaces outputs of svdq: not a folder of someone's own, nor a folder by a file."""
    return UsageError(
        f"{path}: a folder that svdq did not create; --overwrite replaces only svdq's outputs",
        hint="remove it yourself, or choose another path with -o",
        where=str(path),
    )


def _require_writable(path: Path) -> None:
    parent = next(place for place in path.absolute().parents if os.path.lexists(place))
    if not parent.is_dir():
        raise UsageError(f"{path}: can't write there: {parent} is not a folder", hint=_OTHER, where=str(path))
    with tempfile.TemporaryDirectory(dir=parent, prefix=".svdq-probe-"):
        pass


def distinct_names(files: Sequence[str]) -> list[str]:
    """What files that are used together are called, without a path of this machine: by their names or, where several
    have one name (`pytorch_lora_weights.safetensors`), by folder and file."""
    paths = [PurePath(file) for file in files]
    shared = {path.name for path in paths for other in paths if path.name == other.name and path != other}
    return ["/".join(path.parts[-2:]) if path.name in shared else path.name for path in paths]
