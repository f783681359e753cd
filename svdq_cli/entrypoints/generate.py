"""Sampling a checkpoint: how that is done by default, and `generate`, one image or video."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.read import adapter_file
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.errors import UsageError
from svdq_cli.inference.backend import Backend
from svdq_cli.inference.load import load_pipeline
from svdq_cli.lora.attach import load_lora, set_adapters
from svdq_cli.lora.edits import lora_facts
from svdq_cli.pipelines.arguments import opened_image
from svdq_cli.pipelines.generate import generate_one
from svdq_cli.pipelines.generated import Generated
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.pipelines.siblings import makes_sounds, makes_videos, reading_inputs
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.origin import held_already
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Recipe
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.reports import GenerateReport
from svdq_cli.storage.atomic import disk_errors, refuse_existing
from svdq_cli.storage.images import ANIMATED_SUFFIXES, WRITTEN_SUFFIXES, write_image
from svdq_cli.storage.output_paths import require_image_place, require_type
from svdq_cli.storage.sounds import SOUND_SUFFIX, write_sound
from svdq_cli.storage.videos import USUAL_FPS, VIDEO_SUFFIXES, holds_sound, require_encoder, write_video
from svdq_cli.system.machine import resolve_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SIZE_STEP = 16  # pixels: what an autoencoder's scale and a patch divide in every family


@dataclass(frozen=True, slots=True)
class Inputs:
    """What an image or a video is made from besides the prompt."""

    image: Path | None = None
    mask: Path | None = None
    video: Path | None = None
    strength: float | None = None


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
    loras: Sequence[LoraFile] = (),
    base: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> GenerateReport:
    """One image, video or sound from a checkpoint, sampled as `recipe` says but for its inputs. `base`: see
    `load_pipeline`.

    An image that is given decides the size, where neither width nor height does. A text-to-image checkpoint reads it in
    diffusers' image-to-image or inpainting pipeline of the same parts. `loras` run next to the 4-bit layers
    (`lora.attach`); the checkpoint stays as it is.
    """
    refuse_existing(out, overwrite=options.overwrite)
    read = [file for file in (path, inputs.image, inputs.mask, inputs.video) if file is not None]
    require_image_place(out, inputs=read, overwrite=options.overwrite, others=(*VIDEO_SUFFIXES, SOUND_SUFFIX))
    require_encoder(out)
    started = time.monotonic()
    observe, warned = _keeping_warnings(observe)
    checkpoint = open_checkpoint(path, base=base)
    source = checkpoint.source
    read_with = with_inputs(recipe, inputs)
    settings = sampling_for(read_with, replace(source, pipeline=base or source.pipeline)).settings
    settings = replace(_sized(settings, width, height), batch_size=1)
    pipe = load_pipeline(path, device=resolve_device(options.device), backend=backend, base=base)
    facts: Backend = pipe.svdq_backend  # type: ignore[attr-defined]
    for said in (*held_already(checkpoint, loras), *_attached(pipe, loras)):
        observe(Event("warning", "generate", detail=said))
    pipe = reading_inputs(pipe, settings)
    _require_kind(pipe, settings, out)
    made = generate_one(pipe, prompt, settings=settings, observe=observe)
    # MiniMax-H3 has one rate, an attribute of its pipeline, by which its sound is as long as its video
    fps = settings.fps or getattr(pipe, "fps", None) or USUAL_FPS
    _save(made, out, fps)
    width, height = made.frames[0].size if made.frames else (0, 0)
    kept = made.sound is not None and holds_sound(out)
    if made.sound is not None and not kept:
        said = f"{out} holds no sound, which this model makes too: name the output .mp4"
        observe(Event("warning", "generate", detail=said))
    return GenerateReport(
        path=str(out),
        backend=facts.sentence,
        seconds=time.monotonic() - started,
        width=width,
        height=height,
        frames=len(made.frames),
        fps=fps if len(made.frames) > 1 else None,
        audio_seconds=made.sound.seconds if made.sound is not None and kept else None,
        loras=tuple(lora_facts(adapter_file(lora.path), lora.weight, lora.component) for lora in loras),
        warnings=tuple(warned),
    )


def _keeping_warnings(observe: Observer) -> tuple[Observer, list[str]]:
    """An observer that tells `observe` everything, and the list in which it keeps the warnings."""
    warned: list[str] = []

    def hear(event: Event) -> None:
        if event.kind == "warning" and event.detail is not None:
            warned.append(event.detail)
        observe(event)

    return hear, warned


def _attached(pipe: DiffusionPipeline, loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """Switch LoRAs on. Returns what is to be said of them."""
    if not loras:
        return ()
    names = [f"{index}: {lora.path.name}" for index, lora in enumerate(loras)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name, lora in zip(names, loras, strict=True):
            load_lora(pipe, lora.path, name, component=lora.component)
    set_adapters(pipe, {name: lora.weight for name, lora in zip(names, loras, strict=True)})
    return tuple(str(each.message) for each in said)


def _require_kind(pipe: DiffusionPipeline, settings: SamplingSettings, out: Path) -> None:
    """UsageError, before the work, where the file's type does not hold what the pipeline makes."""
    if makes_videos(pipe) and settings.frames != 1:
        require_type(out, VIDEO_SUFFIXES, "a video", hint=", or give --frames 1")
    elif makes_sounds(pipe):
        require_type(out, (SOUND_SUFFIX,), "a sound")
    else:
        require_type(out, (*WRITTEN_SUFFIXES, *ANIMATED_SUFFIXES), "an image")


def _save(made: Generated, path: Path, fps: float) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not made.frames:
            assert made.sound is not None
            write_sound(path, made.sound)
        elif len(made.frames) == 1:
            write_image(path, made.frames[0])
        else:
            write_video(path, made.frames, fps=fps, sound=made.sound)


def with_inputs(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with other images to read: those that are given and no others, not even a mask of the recipe's own."""
    if inputs.mask is not None and inputs.image is None:
        raise UsageError("a mask without an image", hint="give the image that it covers: --image FILE")
    given: dict[str, object] = {
        "image": None if inputs.image is None else str(inputs.image.absolute()),
        "mask": None if inputs.mask is None else str(inputs.mask.absolute()),
        "video": None if inputs.video is None else str(inputs.video.absolute()),
        "strength": inputs.strength,
    }
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
