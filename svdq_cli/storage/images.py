"""Image files: which types are read and written, and how one is written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.storage.atomic import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

WRITTEN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".bmp")
ANIMATED_SUFFIXES = (".webp", ".gif", ".png")  # as which Pillow writes a video


def stacked(frames: Sequence[Image]) -> Image:
    """Images of one size, one below the other; one alone as it is."""
    if len(frames) == 1:
        return frames[0]
    from PIL import Image as pillow

    width, height = frames[0].size
    sheet = pillow.new(frames[0].mode, (width, height * len(frames)))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (0, index * height))
    return sheet


def write_image(path: Path, image: Image, **options: object) -> None:
    """A whole file of the type that the suffix of `path` names. `options`: of Pillow's `save`."""
    from PIL import Image as pillow

    kind = pillow.registered_extensions()[path.suffix.lower()]
    with whole_file(path) as partial:
        image.save(partial, format=kind, **options)
