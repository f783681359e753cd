"""The images of an evaluation on disk: one folder for each way of sampling, one PNG for each prompt, which is animated
where it is a video; its sound is a WAV file next to it.

What the images depend on is stored next to them in `run.json`. A second run with the same facts finds its images and
generates what is missing; one with other facts is refused, so that no figure compares images of two runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image, UnidentifiedImageError

from svdq_cli.errors import InputError, UsageError
from svdq_cli.pipelines.generated import Generated
from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.images import stacked, write_image
from svdq_cli.storage.sounds import SOUND_SUFFIX, Sound, read_sound, write_sound
from svdq_cli.storage.videos import USUAL_FPS, frames_in, write_frames

RUN_FILE = "run.json"
SHOWN_FRAMES = 4  # of a video where it is shown as an image
_SCHEMA = 1

Facts = Mapping[str, object]  # plain JSON


@dataclass(frozen=True, slots=True)
class ImageStore:
    """Images by way of sampling ("16bit", "converted", ...) and index of the prompt. `fps`: of the files of videos."""

    folder: Path
    fps: float = USUAL_FPS

    def path(self, way: str, index: int) -> Path:
        return self.folder / way / f"{index:04d}.png"

    def missing(self, way: str, count: int) -> tuple[int, ...]:
        return tuple(index for index in range(count) if not self.path(way, index).is_file())


def open_image_store(
    folder: Path, facts: Facts, prompts: Sequence[str], *, overwrite: bool, fps: float = USUAL_FPS
) -> ImageStore:
    """The gallery in `folder`, made where there is none. `facts`: what the images depend on besides the prompts.
    `fps`: frames a second of the files of videos.

    A run with more prompts continues one whose prompts are the first of them, and the other way round. UsageError where
    the folder holds something else, or images of another run that are not to be overwritten.
    """
    require_own_folder(folder)
    run = folder / RUN_FILE
    if run.is_file() and overwrite:
        shutil.rmtree(folder)
    if run.is_file():
        _continue_run(run, facts, prompts)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write_run(run, facts, prompts)
    return ImageStore(folder, fps)


def require_own_folder(folder: Path) -> None:
    """UsageError for a folder, or a file, that holds something else than an evaluation."""
    if not folder.exists() or ((folder / RUN_FILE).is_file() and _is_run(folder / RUN_FILE)):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(
            f"{folder}: not written by svdq eval, so it is not replaced",
            hint="choose another name with --report",
            where=str(folder),
            kind="output-exists",
        )


def _is_run(path: Path) -> bool:
    """Other tools call files `run.json`, too. One that can't be read is taken for a damaged one of ours."""
    try:
        return _read(path).keys() >= {"schema", "facts", "prompts"}
    except InputError:
        return True


def keep_image(image_store: ImageStore, way: str, index: int, made: Image.Image | Generated) -> None:
    """Written whole: a file under the image's name is always complete, and its sound is there before it."""
    made = made if isinstance(made, Generated) else Generated((made,))
    path = image_store.path(way, index)
    path.parent.mkdir(exist_ok=True)
    if made.sound is not None:
        write_sound(path.with_suffix(SOUND_SUFFIX), made.sound)
    frames = [frame.convert("RGB") for frame in made.frames]
    if len(frames) == 1:
        write_image(path, frames[0])
    else:
        write_frames(path, frames, fps=image_store.fps)


def read_image(image_store: ImageStore, way: str, index: int) -> Image.Image:
    """RGB, in memory; of a video, SHOWN_FRAMES of its frames at most, from the first to the last, one below the other.
    Raises InputError for a file that is missing or damaged."""
    path = image_store.path(way, index)
    with _readable(path), Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        shown = {round(i * (count - 1) / (SHOWN_FRAMES - 1)) for i in range(SHOWN_FRAMES)}
        return stacked([frame for at, frame in enumerate(frames_in(image)) if at in shown])


def read_frames(image_store: ImageStore, way: str, index: int) -> Iterator[Image.Image]:
    """The frames of a video, or the one of an image, in RGB, one after the other. Raises InputError for a file that is
    missing or damaged."""
    path = image_store.path(way, index)
    with _readable(path), Image.open(path) as image:
        yield from frames_in(image)


def kept_sound(image_store: ImageStore, way: str, index: int) -> Sound | None:
    """The sound of a video; None where it has none."""
    path = image_store.path(way, index).with_suffix(SOUND_SUFFIX)
    return read_sound(path) if path.is_file() else None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    # Pillow raises SyntaxError for broken PNG chunks
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise InputError(
            f"{path}: missing or damaged: {error}",
            hint="delete it and run svdq eval again: it generates what is missing",
            where=str(path),
        ) from error


def _continue_run(run: Path, facts: Facts, prompts: Sequence[str]) -> None:
    found = _read(run)
    there, generated = found.get("facts"), found.get("prompts")
    if found.get("schema") != _SCHEMA or not isinstance(there, dict) or not isinstance(generated, list):
        raise _another_run(run, "made by another version of svdq")
    here = cast("dict[str, object]", json.loads(json.dumps(facts)))  # tuples are lists on disk
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise _another_run(run, f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here")
    common = min(len(generated), len(prompts))
    for index, (old, new) in enumerate(zip(generated[:common], prompts[:common], strict=True)):
        if old != new:
            raise _another_run(run, f"prompt {index} {_short(old)} there, {_short(new)} here")
    if len(prompts) > len(generated):
        _write_run(run, facts, prompts)


def _another_run(run: Path, difference: str) -> UsageError:
    return UsageError(
        f"{run.parent}: holds images of a different run: {difference}",
        hint="choose another folder with --report, or give --overwrite to generate all again",
        where=str(run.parent),
        kind="other-run",
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_run(run: Path, facts: Facts, prompts: Sequence[str]) -> None:
    content = {"schema": _SCHEMA, "facts": facts, "prompts": list(prompts)}
    write_text(run, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable JSON: {error}",
            hint="give --overwrite to generate all images again",
            where=str(path),
        ) from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: expected a JSON object",
            hint="give --overwrite to generate all images again",
            where=str(path),
        )
    return found
