"""Frames and frame rate of the videos that a model was trained for."""

from __future__ import annotations

import re
from collections.abc import Mapping

from svdq_cli.sampling.compression import frames_a_latent, vae_config
from svdq_cli.source import Source
from svdq_cli.storage.videos import FRAME_ARGUMENTS, RATE_ARGUMENTS

EXAMPLE_FPS = "example fps"  # among a call's defaults: no argument has this name
_IN_EXAMPLE = re.compile(r"(?:\bfps|\bframe_rate) ?= ?(\d+(?:\.\d+)?)\b")
_USUAL_FRAMES = 121  # of LTX-2, whose class names no default
_MOST_FRAMES, _MOST_FPS = 1 << 14, 240


def makes_videos(call: Mapping[str, object]) -> bool:
    """Whether the pipeline's call, known by its arguments, answers with videos."""
    return any(name in call for name in FRAME_ARGUMENTS)


def frames_of(source: Source, call: Mapping[str, object]) -> int | None:
    """Frames of one video: the class's default, else what the denoiser's config says; None where the pipeline makes no
    videos, or leaves their length to each call. `call`: the defaults of the pipeline's call, by argument."""
    name = next((name for name in FRAME_ARGUMENTS if name in call), None)
    if name is None:
        return None
    if (given := _whole(call[name])) is not None:
        return given
    config = source.config
    if (own := _whole(config.get("num_frames"))) is not None:  # Stable Video Diffusion
        return own
    if (own := _whole(config.get("sample_frames"))) is None:
        return _USUAL_FRAMES if str(config.get("_class_name")).startswith("LTX2") else None
    # CogVideoX counts frames of the video, Allegro those of its latents
    joined = str(config.get("_class_name")).startswith("Allegro")
    return own * frames_a_latent(vae_config(source.pipeline)) if joined else own


def fps_of(call: Mapping[str, object]) -> float | None:
    """Frames a second: the argument's default, where the model reads it, else the rate at which the class's own example
    writes its video; None where the pipeline makes no videos or says nothing."""
    if not any(name in call for name in (*FRAME_ARGUMENTS, *RATE_ARGUMENTS)):
        return None
    said = [call.get(name) for name in (*RATE_ARGUMENTS, EXAMPLE_FPS)]
    return next(
        (float(rate) for rate in said if isinstance(rate, (int, float)) and 0 < rate <= _MOST_FPS), None
    )


def fps_in_example(text: str) -> float | None:
    """The frame rate in the example of a pipeline's documentation."""
    found = _IN_EXAMPLE.findall(text)
    return float(found[-1]) if found else None


def _whole(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_FRAMES
    return value if whole else None  # type: ignore[return-value]
