"""Where the data that ships with svdq is stored: in a wheel (`svdq_cli/_data/`), or in a checkout next to the package.
And the user's folder for what can be made again."""

from __future__ import annotations

import os
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
    caches."""
    if chosen := os.environ.get("SVDQ_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", _home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return base / "svdq"


def _home() -> Path:
    """The user's folder. A container's bare user id has none: then one among the temporary files."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"svdq-{os.getuid()}"
