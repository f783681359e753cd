"""The pipeline that reads what is given: a text-to-image pipeline's parts also serve diffusers' other pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from svdq_cli.errors import UsageError
from svdq_cli.pipelines.arguments import INPUT_NAMES
from svdq_cli.pipelines.settings import SamplingSettings

# By which pipelines that make sounds are told: how long it lasts
SOUND_ARGUMENTS = ("audio_end_in_s", "audio_length_in_s", "audio_duration", "duration")

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def reading_inputs(pipe: DiffusionPipeline, settings: SamplingSettings) -> DiffusionPipeline:
    """`pipe` itself or, where it does not read the image and mask that are given, diffusers' image-to-image or
    inpainting pipeline of the same parts (FLUX.1, SDXL, SD 3.5, Qwen-Image ...). UsageError where there is none."""
    given = [name for name in ("image", "mask", "video", "strength") if getattr(settings, name)]
    if _reads(pipe, given):
        _require_steps(pipe, settings)
        return pipe
    sibling = _sibling(pipe, mask="mask" in given)
    if sibling is None or not _reads(sibling, given):
        missing = [name for name in given if not _reads(sibling or pipe, [name])]
        raise UsageError(
            f"{type(sibling or pipe).__name__} takes no {' and no '.join(missing)}",
            hint=f"leave out {', '.join(f'--{name}' for name in missing)}",
        )
    _require_steps(sibling, settings)
    sibling.set_progress_bar_config(disable=True)
    return sibling


def makes_videos(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline answers a prompt with frames."""
    return any(name in _arguments(pipe) for name in INPUT_NAMES["frames"])


def makes_sounds(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline answers a prompt with a sound alone."""
    accepted = _arguments(pipe)
    return not makes_videos(pipe) and any(name in accepted for name in SOUND_ARGUMENTS)


def _require_steps(pipe: DiffusionPipeline, settings: SamplingSettings) -> None:
    """UsageError where the pipeline's own strength leaves no step."""
    own = _arguments(pipe).get("strength")
    if settings.image and settings.strength is None and own is not None and isinstance(own.default, float):
        replace(settings, strength=own.default)  # refuses


def _reads(pipe: DiffusionPipeline, given: Collection[str]) -> bool:
    accepted = _arguments(pipe)
    return all(any(argument in accepted for argument in INPUT_NAMES[name]) for name in given)


def _arguments(pipe: DiffusionPipeline) -> Mapping[str, Any]:
    return inspect.signature(type(pipe).__call__).parameters


def _sibling(pipe: DiffusionPipeline, *, mask: bool) -> Any:
    from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image, AutoPipelineForInpainting

    try:
        return (AutoPipelineForInpainting if mask else AutoPipelineForImage2Image).from_pipe(pipe)
    except ValueError:  # diffusers has none, or the parts are not enough
        return None
