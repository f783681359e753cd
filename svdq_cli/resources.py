"""Where the data that ships with svdq lies: in a wheel (`svdq_cli/_data/`), or in a checkout beside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent

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
    """The LoRA that was trained on the embedded model (`svdq_cli.demo.train_lora`)."""
    return demo_model_folder().parent / "pink.safetensors"
