"""The file that makes a folder a pipeline."""

from __future__ import annotations

from pathlib import Path

MODULAR_INDEX = "modular_model_index.json"
INDEXES = ("model_index.json", MODULAR_INDEX)


def index_file(folder: Path) -> Path | None:
    """A folder's index: diffusers' own, or that of Modular Diffusers; None where neither is there."""
    return next((folder / name for name in INDEXES if (folder / name).is_file()), None)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a whole pipeline, modular or not."""
    return index_file(folder) is not None


def is_modular(folder: Path) -> bool:
    """Whether a pipeline is one of Modular Diffusers: blocks, whose index says of each component where it is."""
    index = index_file(folder)
    return index is not None and index.name == MODULAR_INDEX
