"""Where the data that ships with svdq is stored: in a wheel (`svdq_cli/_data/`), or in a checkout next to the package.
And the user's folder for what can be made again."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent.parent

DataFolder = Literal["configs", "calib_prompts", "kernels", "docs"]


def data_root(name: DataFolder) -> Path:
    """The folder of that name. Raises FileNotFoundError when the installation is incomplete."""
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"svdq's data folder {name!r} is missing from this installation")


def demo_model_folder() -> Path:
    """The embedded pipeline, an ordinary diffusers folder."""
    return _PACKAGE / "demo" / "model"


def demo_lora_file() -> Path:
    """The LoRA that was trained on the embedded model (`tools.train_demo.train_lora`)."""
    return demo_model_folder().parent / "pink.safetensors"


def cache_folder() -> Path:
    """Where svdq keeps what it can make again, such as compiled kernels: $SVDQ_CACHE, or the platform's place for
    caches, or one among the temporary files where that can't be written, as in a container's read-only home."""
    if chosen := os.environ.get("SVDQ_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", _home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    folder = base / "svdq"
    return folder if _writable(folder) else _temporary_folder()


def _writable(folder: Path) -> bool:
    """Whether it can be written to, or made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return os.access(there, os.W_OK)


@functools.cache
def _temporary_folder() -> Path:
    """This user's folder among the temporary files. What it holds is run: one that others could have filled is not
    taken, but a new one for this process."""
    if sys.platform == "win32":
        return Path(tempfile.gettempdir()) / "svdq"
    folder = Path(tempfile.gettempdir()) / f"svdq-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="svdq-"))


def _home() -> Path:
    """The user's folder. A container's bare user id has none: then one among the temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return _temporary_folder()
