"""The one place that knows how a model is sampled by default, read from its own files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from svdq_cli.sampling.distilled import distillation_of
from svdq_cli.sampling.file import stored_sampling
from svdq_cli.sampling.size import own_size
from svdq_cli.sampling.video import EXAMPLE_FPS, fps_in_example, fps_of, frames_of, makes_videos
from svdq_cli.source import Source, pipeline_index
from svdq_cli.storage.library_facts import library_fact

MAX_STEPS = 20  # a trajectory of 20 steps passes all that one of 50 passes
SAMPLES, SAMPLES_OF_FEW_STEPS = 64, 96  # a short trajectory shows little: more prompts make up for it
FEW_STEPS = 4


@dataclass(frozen=True, slots=True)
class ModelSampling:
    """How a model is sampled. `None` leaves a setting to the pipeline's class.

    `prompts` are for calibration, `held_out_prompts` for evaluation; both name lists that ship with svdq.
    `differs`: whether steps and guidance are not those that the pipeline's class assumes.
    """

    height: int  # pixels
    width: int  # pixels
    steps: int
    guidance: float | None
    true_cfg: float | None = None
    max_sequence_length: int | None = None  # text tokens
    frames: int | None = None  # of a video
    fps: float | None = None  # frames a second, of a video
    batch_size: int = 1
    samples: int = SAMPLES
    prompts: str = "calib_prompts/general.txt"
    held_out_prompts: str = "calib_prompts/general_eval.txt"
    example_prompt: str = "a lighthouse on a cliff at dawn, photograph"
    basis: str = ""  # where steps and guidance were read, for people
    differs: bool = False


def sampling_of(source: Source, *, loras: Sequence[str] = ()) -> ModelSampling:
    """How `source` is sampled by default.

    In this order: the file that its folder carries (`SAMPLING_FILE`), what its configs say of distillation, its name
    and the names of the `loras` that were merged into it, and the defaults of its diffusers class.
    Raises InputError for a damaged config.
    """
    call = _class_defaults(source)
    height, width = own_size(source, call)
    video = {"frames": frames_of(source, call), "fps": fps_of(call)}
    if (stored := stored_sampling(source)) is not None:
        size = {"height": height, "width": width, **video}
        return ModelSampling(**{**size, **stored, "basis": "the model's sampling file", "differs": True})  # type: ignore[arg-type]
    guidance, true_cfg = _number(call.get("guidance_scale")), _number(call.get("true_cfg_scale"))
    if found := distillation_of(source, loras):
        # Qwen-Image is guided by true_cfg alone
        guided = None if call and guidance is None else found.guidance
        return ModelSampling(
            height,
            width,
            steps=found.steps,
            guidance=guidance if found.keeps_guidance else guided,
            true_cfg=None if true_cfg is None else 1.0,
            max_sequence_length=found.max_sequence_length,
            samples=SAMPLES_OF_FEW_STEPS if found.steps <= FEW_STEPS else SAMPLES,
            basis=found.basis,
            differs=True,
            **video,
        )
    own_steps = call.get("num_inference_steps")
    steps = min(own_steps, MAX_STEPS) if isinstance(own_steps, int) else MAX_STEPS
    basis = "the defaults of its diffusers class" if call else "svdq's defaults"
    samples = SAMPLES_OF_FEW_STEPS if steps <= FEW_STEPS else SAMPLES
    return ModelSampling(height, width, steps, guidance, true_cfg, samples=samples, basis=basis, **video)


def makes_no_videos(source: Source) -> bool:
    """Whether the pipeline's class is known to answer without frames: with an image, or a sound."""
    call = _class_defaults(source)
    return bool(call) and not makes_videos(call)


def _class_defaults(source: Source) -> Mapping[str, object]:
    """The defaults of the pipeline class's call, by argument; empty where the class is not known."""
    if source.pipeline is None:
        return {}
    name = str(pipeline_index(source.pipeline).get("_class_name"))
    try:
        return cast("dict[str, object]", library_fact("call", (name,), lambda: _asked_defaults(name)))
    except Exception:  # diffusers imports its classes late, and raises whatever their libraries raise
        return {}


def _asked_defaults(pipeline_class: str) -> Mapping[str, object]:
    """Those that are numbers, texts or None; of every other argument None."""
    import diffusers

    found = getattr(diffusers, pipeline_class)
    if issubclass(found, diffusers.ModularPipeline):
        inputs = {param.name: param.default for param in found().blocks.inputs if param.name}
        return {
            name: value if isinstance(value, (int, float, str)) else None for name, value in inputs.items()
        }
    call = found.__call__
    given = {key: argument.default for key, argument in inspect.signature(call).parameters.items()}
    plain = {key: value if isinstance(value, (int, float, str)) else None for key, value in given.items()}
    return {**plain, EXAMPLE_FPS: fps_in_example(inspect.getdoc(call) or "")}


def _number(value: object) -> float | None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if right else None  # type: ignore[arg-type]
