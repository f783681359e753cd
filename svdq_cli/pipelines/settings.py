"""How images are generated, for calibration and for evaluation alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdq_cli.errors import InputError, UsageError
from svdq_cli.records import MAX_SEED, following_seed
from svdq_cli.storage.images import READ_SUFFIXES
from svdq_cli.storage.videos import VIDEO_SUFFIXES

_FILES = ("image", "mask", "video")  # what a pipeline may read besides text
_INPUTS = (*_FILES, "strength", "frames", "fps")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image or a video that the pipeline reads. Digests cover its content, not its path."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """`None` leaves a setting to the pipeline. Image i is seeded with `seed_of(i)`, whatever its batch.

    `true_cfg` above 1 generates with a second, unconditional pass (an empty negative prompt) where the pipeline has
    one. Pipelines that edit read `image`, `mask` and `video`: prompt i takes file i of each, and they start over where
    there are fewer than prompts. `strength`, above 0 and at most 1, says how much of the image is changed. Pipelines
    that make videos make `frames` images a prompt, `fps` of them a second.
    """

    steps: int
    guidance: float | None
    height: int  # pixels
    width: int  # pixels
    seed: int
    max_sequence_length: int | None = None  # text tokens
    batch_size: int = 1
    true_cfg: float = 1.0
    image: tuple[ImageFile, ...] = ()
    mask: tuple[ImageFile, ...] = ()
    video: tuple[ImageFile, ...] = ()
    frames: int | None = None
    strength: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", hint=f"give {name} a value of 1 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"seed is {self.seed}", hint=f"give a seed of 0 to {MAX_SEED}")

        if self.strength is not None:
            self._check_strength(self.strength)

    def _check_strength(self, strength: float) -> None:
        if not 0 < strength <= 1:
            raise UsageError(f"strength is {strength}", hint="give a strength above 0 and at most 1")
        if not self.image:
            raise UsageError("a strength without an image", hint="give the image to change: --image FILE")
        if int(self.steps * strength) < 1:
            raise UsageError(
                f"a strength of {strength} leaves none of the {self.steps} steps",
                hint=f"use {math.ceil(1 / strength)} steps or more, or a higher strength",
            )

    def seed_of(self, index: int) -> int:
        """The seed of one image. The largest seed is followed by 0."""
        return following_seed(self.seed, index)


def given_inputs(settings: SamplingSettings) -> frozenset[str]:
    """The files that the pipeline reads, by the recipe's keys."""
    return frozenset(name for name in _FILES if getattr(settings, name))


def image_files(path: Path) -> tuple[ImageFile, ...]:
    """One image, or all images of a folder by name. Raises InputError where there is none."""
    return _files(path, READ_SUFFIXES, "image")


def video_files(path: Path) -> tuple[ImageFile, ...]:
    """One video, or all videos of a folder by name. Raises InputError where there is none."""
    return _files(path, VIDEO_SUFFIXES, "video")


def _files(path: Path, suffixes: tuple[str, ...], kind: str) -> tuple[ImageFile, ...]:
    def is_one(file: Path) -> bool:
        return file.is_file() and file.suffix.lower() in suffixes

    files = sorted(file for file in path.iterdir() if is_one(file)) if path.is_dir() else [path]
    if not files or not all(is_one(file) for file in files):
        article = "an" if kind == "image" else "a"
        raise InputError(
            f"{path}: no {kind} in this folder" if path.exists() else f"{path}: no such file or folder",
            hint=f"give {article} {kind} ({', '.join(suffixes)}) or a folder of {kind}s",
            where=str(path),
            kind="input" if path.exists() else "not-found",
        )
    return tuple(ImageFile(str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files)


def settings_json(settings: SamplingSettings) -> dict[str, Any]:
    """The settings as plain JSON; unused inputs are left out."""
    return {key: value for key, value in asdict(settings).items() if value or key not in _INPUTS}


def settings_of_json(plain: Mapping[str, Any]) -> SamplingSettings:
    """The inverse of `settings_json`. TypeError or KeyError for anything else."""
    images = {key: tuple(ImageFile(**item) for item in plain[key]) for key in _FILES if key in plain}
    return SamplingSettings(**{**plain, **images})
