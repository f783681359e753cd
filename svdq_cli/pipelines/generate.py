"""The border with diffusers: images generated with a pipeline, the same way everywhere."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from svdq_cli.errors import (
    EnvironmentLacksError,
    OutOfResourcesError,
    SvdqError,
    UsageError,
    first_line,
    stopped,
)
from svdq_cli.pipelines.arguments import INPUT_NAMES, ONE_AT_A_TIME, missing_inputs, optional_arguments
from svdq_cli.pipelines.batches import Batch, split_batches
from svdq_cli.pipelines.embeddings import EncodedPrompts
from svdq_cli.pipelines.finite import finite_images, require_finite_latents
from svdq_cli.pipelines.generated import Generated, answers_of, generated_of
from svdq_cli.pipelines.modular import answer_of, is_modular_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.storage.images import stacked

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image

# Modules of diffusers that bring images and videos into shape: handed None, they speak of their formats
_READERS = ("image_processor.py", "video_processor.py")
_OUTPUT = "output_type"  # the argument
OnStep = Callable[[int], None]  # called with the number of denoising steps done, 1 and up


def generate_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    settings: SamplingSettings,
    seeds: Sequence[int] | None = None,
    stage: str = "generate",
    observe: Observer = ignore_events,
    on_step: OnStep | None = None,
) -> list[Image]:
    """One image per prompt; of a video, its frames one below the other. An image depends on its prompt and seed, not on
    the batch it was generated in.

    `seeds` default to those of `settings`. Events count images times steps. Raises UsageError for a pipeline that makes
    sounds alone.
    """
    generated = generate_each(
        pipe, prompts, settings=settings, seeds=seeds, stage=stage, observe=observe, on_step=on_step
    )
    return [_image_of(made, pipe) for _, made in generated]


def _image_of(made: Generated, pipe: DiffusionPipeline) -> Image:
    if not made.frames:
        raise UsageError(
            f"{type(pipe).__name__} makes sounds, not images",
            hint="svdq generate writes them to a file; from Python, generate_one gives them",
        )
    return stacked(made.frames)


def generate_each(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    settings: SamplingSettings,
    seeds: Sequence[int] | None = None,
    stage: str = "generate",
    observe: Observer = ignore_events,
    on_step: OnStep | None = None,
    wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[tuple[int, Generated]]:
    """`generate_images`, one by one with its index, so that no more than a batch is held.

    Batches that hold no `wanted` image are left out; the others are generated whole, so that an image is the same
    whatever was left out.
    """
    batches = [
        batch
        for batch in split_batches(prompts, settings=settings, seeds=seeds)
        if any(wanted(batch.first + i) for i in range(len(batch.prompts)))
    ]
    generated = generated_batches(
        pipe,
        batches,
        settings=settings,
        total=len(prompts),
        output_type="pil",
        stage=stage,
        observe=observe,
        on_step=on_step,
    )
    for batch, answers in zip(batches, generated, strict=True):
        for index, answer in enumerate(answers, batch.first):
            yield index, _checked(generated_of(answer), pipe, settings)


def generate_one(
    pipe: DiffusionPipeline, prompt: str, *, settings: SamplingSettings, observe: Observer = ignore_events
) -> Generated:
    """What the pipeline makes of one prompt."""
    batches = generated_batches(
        pipe,
        split_batches([prompt], settings=settings),
        settings=settings,
        total=1,
        output_type="pil",
        stage="generate",
        observe=observe,
    )
    (answer,) = next(iter(list(batches)))
    return _checked(generated_of(answer), pipe, settings)


def _checked(made: Generated, pipe: DiffusionPipeline, settings: SamplingSettings) -> Generated:
    for frame in made.frames:
        _check_image(frame, pipe, settings)
    return made


def _check_image(image: Image, pipe: DiffusionPipeline, settings: SamplingSettings) -> None:
    """UsageError for what is not an image of the size that was asked for."""
    if not hasattr(image, "size") or callable(image.size):
        raise UsageError(
            f"{type(pipe).__name__} makes no images but {type(image).__name__}s",
            hint="svdq generate and eval make images, videos and sounds; run it from Python: "
            "svdq_cli.load_pipeline(CKPT)",
        )
    if image.size != (settings.width, settings.height):
        raise UsageError(
            f"asked for {settings.width}x{settings.height} pixels, but {type(pipe).__name__} generates "
            f"{image.width}x{image.height}",
            hint=f"use width {image.width} and height {image.height}",
        )


def generated_batches(
    pipe: DiffusionPipeline,
    batches: Sequence[Batch],
    *,
    settings: SamplingSettings,
    total: int,
    output_type: str,
    stage: str,
    observe: Observer,
    encoded: EncodedPrompts | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    on_step: OnStep | None = None,
) -> Iterator[list[Any]]:
    """Generates batch after batch, with events. `on_batch` is called before each.

    `total`: images of the whole stage; those that are not in `batches` count as generated before. `encoded` holds the
    prompts' embeddings where the pipeline has no text encoders any more.
    """
    steps = settings.steps
    generated = total - sum(len(batch.prompts) for batch in batches)
    with _steps_observed(stage, generated * steps, total * steps, observe) as advance:
        for batch in batches:
            before, size = generated * steps, len(batch.prompts)

            def step_done(step: int, before: int = before, size: int = size) -> None:
                if on_step is not None:
                    on_step(step)
                # schedulers of second order take more than `steps` steps
                advance(before + size * min(step, steps))

            if on_batch is not None:
                on_batch(batch)
            yield denoise(
                pipe, batch, settings=settings, output_type=output_type, encoded=encoded, on_step=step_done
            )
            generated += size
            advance(generated * steps)


def denoise(
    pipe: DiffusionPipeline,
    batch: Batch,
    *,
    settings: SamplingSettings,
    output_type: str,
    encoded: EncodedPrompts | None = None,
    on_step: OnStep | None = None,
) -> list[Any]:
    """Generate one batch: what the pipeline answers for each prompt (`generated_of` reads it). `output_type` "latent"
    stops before the autoencoder. `encoded` replaces the text encoders.

    Passes only what the pipeline's __call__ takes. A pipeline without step callbacks never calls `on_step`.
    """
    call = cast(Callable[..., Any], pipe)
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments = {
        "prompt": _alone(batch.prompts),
        "num_inference_steps": settings.steps,
        "height": settings.height,
        "width": settings.width,
        # on the CPU: a CUDA generator draws other numbers on another GPU model
        "generator": _alone([torch.Generator("cpu").manual_seed(seed) for seed in batch.seeds]),
        "output_type": _output_type(output_type, accepted),
        "callback_on_step_end": _step_callback(on_step, images=output_type != "latent"),
        **optional_arguments(
            settings,
            accepted=accepted,
            pipeline=type(pipe).__name__,
            images=range(batch.first, batch.first + len(batch.prompts)),
        ),
    }
    try:
        with finite_images(pipe), encoded.replayed(pipe, batch) if encoded else nullcontext():
            given = {name: value for name, value in arguments.items() if name in accepted}
            if is_modular_pipeline(pipe):
                return answer_of(pipe, given)
            return answers_of(pipe, call(**given))
    except Exception as error:
        refused = _refusal_of(error, pipe, batch, settings, missing_inputs(settings, accepted))
        if refused is None:
            raise
        raise refused from error


def _refusal_of(
    error: Exception,
    pipe: DiffusionPipeline,
    batch: Batch,
    settings: SamplingSettings,
    missing: Sequence[str],
) -> SvdqError | None:
    """What went wrong in a pipeline's call as the refusal it is; None for a bug, and for what is a refusal already."""
    name, count = type(pipe).__name__, len(batch.prompts)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return OutOfResourcesError(
            f"out of memory while generating {count} images of {settings.width}x{settings.height} at a time",
            hint="lower the batch size or the image size, or use --device cpu",
        )
    if stopped(error) is not None:
        return None
    if isinstance(error, (TypeError, ValueError, AttributeError)) and (
        refused := _as_usage_error(error, pipe, missing)
    ):
        return refused
    if isinstance(error, NameError):
        # diffusers imports what cleans prompts only where it is there, and some pipelines use it all the same
        return EnvironmentLacksError(
            f"{name} needs the Python package {error.name}", hint=f"pip install {error.name}"
        )
    if count > 1:
        # some pipelines refuse several prompts in words, others run into whatever comes of them
        return UsageError(
            f"{name} could not generate for {count} prompts at once: {first_line(error)}",
            hint=ONE_AT_A_TIME,
        )
    return None


def _output_type(wanted: str, accepted: Mapping[str, inspect.Parameter]) -> Any:
    """The form that a pipeline answers in: images, as they are `wanted`; those that make sounds alone, and take no
    height, have forms of their own."""
    usual = accepted[_OUTPUT].default if _OUTPUT in accepted else None
    return usual if wanted == "pil" and "height" not in accepted and usual in ("np", "pt") else wanted


def _alone(values: Sequence[Any]) -> Any:
    """One value is not put into a list: some pipelines take no lists."""
    return values[0] if len(values) == 1 else list(values)


def _as_usage_error(
    error: BaseException, pipe: DiffusionPipeline, missing: Sequence[str]
) -> UsageError | None:
    """What a pipeline said of its arguments, as the refusal it is; None for a bug. `missing`: inputs that it takes and
    did not get."""
    name, said = type(pipe).__name__, first_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    blamed = [one for one in missing if any(argument in said for argument in INPUT_NAMES[one])]
    if isinstance(error, ValueError) and not blamed and any(one.name == "check_inputs" for one in frames):
        return UsageError(f"{name}: {said}", hint="give other sizes, inputs or settings")
    if not (wanted := blamed or (missing if _of_nothing(said, frames) else ())):
        return None
    return UsageError(
        f"{name} could not generate without {' and '.join(wanted)}: {said}",
        hint=f"give {' and '.join(f'--{one}' for one in wanted)} to generate and eval; a recipe names "
        f"{' and '.join(wanted)} under calibration",
    )


def _of_nothing(said: str, frames: traceback.StackSummary) -> bool:
    """Whether an error that names no input may come from one that is None: it says so, or what reads images and videos
    raised it."""
    return "None" in said or Path(frames[-1].filename).name in _READERS


def _step_callback(on_step: OnStep | None, *, images: bool) -> Callable[..., dict[str, Any]] | None:
    """`images`: latents must be finite. Calibration, which makes none, names the layer where they are not."""
    if on_step is None and not images:
        return None

    def at_step_end(
        pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        if images:
            require_finite_latents(pipe, tensors.get("latents"), step + 1)
        return tensors

    return at_step_end


@contextmanager
def _steps_observed(stage: str, done: int, total: int, observe: Observer) -> Iterator[Callable[[int], None]]:
    """Events of one stage that counts images times steps. Yields `advance(done)`; repeating a count is silent."""
    started = time.monotonic()
    last = done

    def advance(done: int) -> None:
        nonlocal last
        if done > last:
            last = done
            observe(Event("advance", stage, done, total, seconds=time.monotonic() - started))

    observe(Event("start", stage, done, total))
    yield advance
    observe(Event("end", stage, total, total, seconds=time.monotonic() - started))
