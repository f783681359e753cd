"""Image files: which types are read and written, and how one is written whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.storage.atomic import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

WRITTEN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".bmp")
ANIMATED_SUFFIXES = (".webp", ".gif", ".png")  # as which Pillow writes a video


def write_image(path: Path, image: Image, **options: object) -> None:
    """A whole file of the type that the suffix of `path` names. `options`: of Pillow's `save`."""
    from PIL import Image as pillow

    kind = pillow.registered_extensions()[path.suffix.lower()]
    with whole_file(path) as partial:
        image.save(partial, format=kind, **options)
