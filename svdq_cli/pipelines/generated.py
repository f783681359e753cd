"""What pipelines answer a prompt with: an image, the frames of a video, a sound, or a video with its sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from svdq_cli.storage.sounds import Sound, sound_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image

PICTURES = ("images", "videos", "frames", "image")  # what the library's outputs call them
_SOUNDS = ("audios", "audio")
OUTPUTS = (*PICTURES, *_SOUNDS)
# Where a pipeline's sampling rate is: of a part, by its attribute or in its config; the first that is there
_RATES = (
    ("vocoder", "output_sampling_rate"),
    ("vocoder", "sampling_rate"),
    ("audio_vae", "sampling_rate"),
    ("audio_vae", "sample_rate"),
    ("vae", "sampling_rate"),
    ("vae", "sample_rate"),
    ("sound_tokenizer", "sampling_rate"),
)
USUAL_RATE = 44100


@dataclass(frozen=True, slots=True)
class Generated:
    """What was made of one prompt: one frame is an image, several are a video, none a sound alone."""

    frames: tuple[Image, ...]
    sound: Sound | None = None


@dataclass(frozen=True, slots=True)
class _WithSound:
    """A pipeline's answer to one prompt. `frames`: None of a sound alone."""

    frames: Any
    sound: Sound


def answers_of(pipe: DiffusionPipeline, out: Any) -> list[Any]:
    """The output of a pipeline's call, prompt by prompt. Latents are left as they are."""
    made = {name: getattr(out, name) for name in OUTPUTS if getattr(out, name, None) is not None}
    assert made, f"{type(out).__name__} holds neither images nor sounds"
    return answers_in(pipe, made)


def answers_in(pipe: object, made: Mapping[str, Any]) -> list[Any]:
    """What a pipeline made, by the names of `OUTPUTS`, prompt by prompt; the first of each kind that is there."""
    pictures = next((made[name] for name in PICTURES if name in made), None)
    samples = next((made[name] for name in _SOUNDS if name in made), None)
    # latents, and the sound's are no sound
    if samples is None or (pictures is not None and isinstance(pictures, torch.Tensor)):
        return list(cast("Any", pictures))
    sounds = [sound_of(torch.as_tensor(one), sampling_rate(pipe)) for one in samples]
    frames: Sequence[Any] = [None] * len(sounds) if pictures is None else list(pictures)
    return [_WithSound(*each) for each in zip(frames, sounds, strict=True)]


def generated_of(answer: Any) -> Generated:
    """One of a decoded batch's answers."""
    if not isinstance(answer, _WithSound):
        return Generated(_frames(answer))
    return Generated(() if answer.frames is None else _frames(answer.frames), answer.sound)


def _frames(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, list) else (found,)


def sampling_rate(pipe: object) -> int:
    """Samples a second of the sounds that a pipeline makes."""
    for name, key in _RATES:
        part = getattr(pipe, name, None)
        config = getattr(part, "config", None)
        # a model's own attributes of its config's names are deprecated
        said = config[key] if isinstance(config, Mapping) and key in config else getattr(part, key, None)
        if isinstance(said, int) and said > 0:
            return said
    return USUAL_RATE
