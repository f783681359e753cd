"""Files and folders that are whole or absent: written next to their final path, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from svdq_cli.errors import OutOfResourcesError, UsageError


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
def whole_output(path: Path, *, overwrite: bool) -> Generator[Path, None, None]:
    """A file or folder that appears at `path` complete or not at all.

    Yields a partial path next to it, where nothing is yet; what is there at the end is renamed. Whatever happens
    inside, nothing is left under the final name but a whole output (or the old one).
    """
    refuse_existing(path, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _remove(partial)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync_files(partial)
            refuse_existing(path, overwrite=overwrite)  # another process may have been faster
            if os.path.lexists(path):
                old = path.with_name(f".{path.name}.old-{os.getpid()}")
                path.rename(old)
                partial.rename(path)
                _remove(old)
            else:
                partial.rename(path)
    finally:
        _remove(partial)


def remove_leftovers(path: Path) -> None:
    """What runs that were killed left of this output: partial ones, and old ones that were being replaced. An old one
    whose place nothing has taken yet goes back there. Only for who knows that no other process writes it."""
    if not path.parent.is_dir():
        return
    for other in list(path.parent.iterdir()):
        is_old = other.name.startswith(f".{path.name}.old-")
        if is_old and not os.path.lexists(path):
            other.rename(path)
        elif is_old or other.name.startswith(f".{path.name}.partial-"):
            _remove(other)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Generator[Path, None, None]:
    """`whole_output` for a folder, which is there already when it is yielded."""
    with whole_output(path, overwrite=overwrite) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def disk_errors(path: Path, *, option: str = "-o") -> Generator[None, None, None]:
    """Turn the system's disk errors into svdq's, naming the output and the cure. `option` chose the place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
            too_large = number == errno.EFBIG  # FAT takes 4 GB
            raise OutOfResourcesError(
                f"{path}: {'the file exceeds the size limit of the file system' if too_large else 'the disk is full'}",
                hint=f"free some space, or write to another disk with {option}; "
                "no output was written under the final name",
                where=str(path),
                kind="disk-full",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UsageError(
                f"{path}: can't write there: {error.strerror}",  # type: ignore[union-attr]
                hint=f"choose a folder you may write to with {option}",
                where=str(path),
            ) from error
        raise


def sync_files(path: Path) -> None:
    """Force every file to the disk, as must be done before a rename makes it visible."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
