"""Sampling a checkpoint: how that is done by default, and `generate`, one image or video."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.errors import UsageError
from svdq_cli.inference.backend import Backend
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.arguments import opened_image
from svdq_cli.pipelines.generate import generate_one
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.pipelines.siblings import makes_videos, reading_inputs
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Recipe
from svdq_cli.records import Observer, ignore_events
from svdq_cli.reports import GenerateReport
from svdq_cli.storage.atomic import disk_errors, refuse_existing
from svdq_cli.storage.images import write_image
from svdq_cli.storage.output_paths import require_animated, require_image_place
from svdq_cli.system.machine import resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE_STEP = 16  # pixels: what an autoencoder's scale and a patch divide in every family
VIDEO_FPS = 16


@dataclass(frozen=True, slots=True)
class Inputs:
    """What an image or a video is made from besides the prompt."""

    image: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    frames: int | None = None


NO_INPUTS = Inputs()


def generate(
    path: Path,
    prompt: str,
    out: Path,
    *,
    recipe: Recipe,
    backend: str = "auto",
    width: int | None = None,
    height: int | None = None,
    inputs: Inputs = NO_INPUTS,
    base: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> GenerateReport:
    """One image, or one video, from a checkpoint, sampled as `recipe` says but for its inputs. `base`: see
    `load_pipeline`.

    An image that is given decides the size, where neither width nor height does. A text-to-image checkpoint reads it in
    diffusers' image-to-image or inpainting pipeline of the same parts.
    """
    refuse_existing(out, overwrite=options.overwrite)
    read = [file for file in (path, inputs.image, inputs.mask) if file is not None]
    require_image_place(out, inputs=read, overwrite=options.overwrite, animated=True)
    started = time.monotonic()
    source = open_checkpoint(path, base=base).source
    read_with = with_inputs(recipe, inputs)
    settings = sampling_for(read_with, replace(source, pipeline=base or source.pipeline)).settings
    settings = replace(_sized(settings, width, height), batch_size=1)
    pipe = load_pipeline(path, device=resolve_device(options.device), backend=backend, base=base)
    facts: Backend = pipe.svdq_backend  # type: ignore[attr-defined]
    pipe = reading_inputs(pipe, settings)
    if makes_videos(pipe) and settings.frames != 1:
        require_animated(out)
    frames = generate_one(pipe, prompt, settings=settings, observe=observe)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _save(frames, out)
    return GenerateReport(
        path=str(out),
        backend=facts.sentence,
        seconds=time.monotonic() - started,
        width=frames[0].width,
        height=frames[0].height,
        frames=len(frames),
    )


def _save(frames: Sequence[Image], path: Path) -> None:
    if len(frames) == 1:
        write_image(path, frames[0])
    else:
        moving = {"save_all": True, "append_images": frames[1:], "duration": 1000 / VIDEO_FPS, "loop": 0}
        write_image(path, frames[0], **moving)


def with_inputs(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with other images to read: those that are given and no others, not even a mask of the recipe's own."""
    if inputs.mask is not None and inputs.image is None:
        raise UsageError("a mask without an image", hint="give the image that it covers: --image FILE")
    given: dict[str, object] = {
        "image": None if inputs.image is None else str(inputs.image.absolute()),
        "mask": None if inputs.mask is None else str(inputs.mask.absolute()),
        "strength": inputs.strength,
    }
    if inputs.frames is not None:
        given["frames"] = inputs.frames
    calibration = recipe.calibration or Calibration()
    return recipe.model_copy(update={"calibration": calibration.model_copy(update=given)})


def _sized(settings: SamplingSettings, width: int | None, height: int | None) -> SamplingSettings:
    """Settings with the requested width and height. What is not requested has the proportions of the image that is
    read, and no more pixels than the model's own size."""
    if not settings.image:
        return replace(settings, width=width or settings.width, height=height or settings.height)
    image = opened_image(settings.image[0])
    if width is None and height is None:
        scale = min(1.0, math.sqrt(settings.width * settings.height / (image.width * image.height)))
    else:
        scale = width / image.width if width is not None else (height or 0) / image.height
    return replace(
        settings,
        width=width or _divisible(scale * image.width),
        height=height or _divisible(scale * image.height),
    )


def _divisible(pixels: float) -> int:
    return max(1, round(pixels / SIZE_STEP)) * SIZE_STEP
