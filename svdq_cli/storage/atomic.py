"""The one way to write a file or a folder: whole or not at all, next to its place first and then renamed.

What must survive a power cut is synced before the rename, and so is the new name: everything but a cache, which can be
made again. What is unfinished is called `.NAME.partial-PID` everywhere, so that whoever cleans up after a killed
process knows it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from svdq_cli.errors import EnvironmentLacksError, OutOfResourcesError, UsageError, as_full_disk, errno_of

_UNFINISHED = re.compile(r"\..+\.(partial|old)-\d+", re.DOTALL)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError when the output is there already, before any work is done."""
    if os.path.lexists(path) and not overwrite:  # a link to nowhere is something too
        raise UsageError(
            f"{path}: the output already exists",
            hint="choose another name with -o, or pass --overwrite to replace it",
            where=str(path),
            kind="output-exists",
        )


def require_disk(needed: Mapping[Path, int]) -> None:
    """Raises OutOfResourcesError when a disk can't hold all that is to be written to it: path -> bytes."""
    disks: dict[int, list[Path]] = {}
    for path in needed:
        disks.setdefault(existing(path).stat().st_dev, []).append(path)
    for paths in disks.values():
        total, free = sum(needed[path] for path in paths), shutil.disk_usage(existing(paths[0])).free
        if free < total:
            raise OutOfResourcesError(
                f"{paths[0]}: needs {total / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB left",
                hint="free some space, or write to another disk with -o",
                where=str(paths[0]),
                kind="disk-full",
            )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Generator[Path, None, None]:
    """A file that appears at `path` complete or not at all, in place of any file that is there.

    Yields the partial path to write to. `durable=False`, for caches, leaves out the syncs. The system's errors pass as
    they are: `disk_errors` around it says them in svdq's words.
    """
    partial = _partial(path)
    try:
        yield partial
        if durable:
            sync_files(partial)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise
    if durable:
        _sync_name(path)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """A whole file of text, UTF-8."""
    with whole_file(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_output(path: Path, *, overwrite: bool) -> Generator[Path, None, None]:
    """A command's output, file or folder, that appears at `path` complete or not at all.

    Yields a partial path next to it, where nothing is yet; what is there at the end is renamed. Whatever happens
    inside, nothing is left under the final name but a whole output (or the old one). Raises UsageError where something
    is there that may not be replaced, or nothing may be written; OutOfResourcesError on a full disk.
    """
    refuse_existing(path, overwrite=overwrite)
    partial = _partial(path)
    _remove(partial)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync_files(partial)
            refuse_existing(path, overwrite=overwrite)  # another process may have been faster
            if os.path.lexists(path):
                _put_in_place_of(path, partial)
            else:
                partial.rename(path)
            _sync_name(path)
    finally:
        _remove(partial)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Generator[Path, None, None]:
    """`whole_output` for a folder, which is there already when it is yielded."""
    with whole_output(path, overwrite=overwrite) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def cached_folder(path: Path) -> Generator[Path, None, None]:
    """A folder of a cache, whole but not synced. Where another process was faster, its copy stays. Errors as those of
    `whole_file`."""
    partial = _partial(path)
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        _remove(partial)


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is one that was not finished, or was being replaced."""
    return _UNFINISHED.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> None:
    """What killed processes left unfinished in a folder and those within. Only for who knows that no other process
    writes there."""
    for path in [path for path in folder.rglob(".*") if is_unfinished(path.name)]:
        _remove(path)


def remove_leftovers(path: Path) -> None:
    """What killed runs left of this output: partial ones, and old ones that were being replaced. An old one whose place
    nothing has taken yet goes back there. Only for who knows that no other process writes it."""
    if not path.parent.is_dir():
        return
    for other in list(path.parent.iterdir()):
        is_old = other.name.startswith(f".{path.name}.old-")
        if is_old and not os.path.lexists(path):
            other.rename(path)
        elif is_old or other.name.startswith(f".{path.name}.partial-"):
            _remove(other)


def _write_errors() -> tuple[type[Exception], ...]:
    """What a failed write raises: also safetensors' own error, which only comes where safetensors was imported."""
    safetensors = sys.modules.get("safetensors")
    return (OSError, safetensors.SafetensorError) if safetensors else (OSError,)


@contextmanager
def disk_errors(path: Path, *, option: str = "-o") -> Generator[None, None, None]:
    """Turn the system's disk errors into svdq's, naming the output and the cure. `option` chose the place."""
    try:
        yield
    except _write_errors() as error:
        if full := as_full_disk(error, path, hint=f"free some space, or write to another disk with {option}"):
            raise full from error
        number = errno_of(error)
        if number in _NOT_WRITABLE:
            raise UsageError(
                f"{path}: can't write there: {os.strerror(number)}",
                hint=f"choose a folder you may write to with {option}",
                where=str(path),
            ) from error
        raise


@contextmanager
def cache_errors(folder: Path, what: str) -> Generator[None, None, None]:
    """`disk_errors` for a cache in `folder` that can't be done without. `what` is kept there, in words."""
    try:
        yield
    except OSError as error:
        cure = "set SVDQ_CACHE to a folder that you may write to"
        if full := as_full_disk(error, folder, hint=f"free some space, or {cure}"):
            raise full from error
        raise EnvironmentLacksError(
            f"{folder}: {what} can't be stored there: {error.strerror or error}",
            hint=cure,
            where=str(folder),
            kind="no-cache",
        ) from error


def sync_files(path: Path) -> None:
    """Force a file, or all files of a folder, to the disk, as must be done before a rename makes them visible."""
    mode = "rb" if os.name == "posix" else "r+b"  # copies of read-only files are read-only
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with file.open(mode) as opened:
                os.fsync(opened.fileno())


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _put_in_place_of(path: Path, partial: Path) -> None:
    """A folder can't be renamed over another, so the old output steps aside first, and comes back if need be."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    _remove(old)


def _sync_name(path: Path) -> None:
    """Force the name of a file or folder to the disk."""
    if os.name != "posix":  # elsewhere a folder can't be opened, and the rename is as durable as it gets
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
