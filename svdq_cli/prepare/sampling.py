"""How a recipe's model is sampled: the recipe's settings over the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import UsageError
from svdq_cli.pipelines.settings import ImageFile, SamplingSettings, image_files, video_files
from svdq_cli.recipe import (
    Calibration,
    Recipe,
    default_recipe,
    find_source,
)
from svdq_cli.sampling import ModelSampling, makes_no_videos, sampling_of
from svdq_cli.source import Source, pipeline_index


@dataclass(frozen=True, slots=True)
class Sampling:
    """What calibration generates with the 16-bit model, and what it keeps of it."""

    settings: SamplingSettings
    samples: int  # images, at most
    rows: int  # activation rows kept of every layer input
    size_bytes: int  # that all statistics may take


def with_model_sampling(recipe: Recipe, source: Source, *, held_out: bool = False) -> Recipe:
    """The recipe with every setting of its calibration that it leaves open filled in with the model's own.

    `held_out`: for evaluation, with prompts that calibration does not see.
    """
    if recipe.calibration is None:
        return recipe
    wanted = _with_model_sampling(recipe.calibration, recipe, source, held_out=held_out)
    return recipe.model_copy(update={"calibration": wanted})


def _with_model_sampling(
    wanted: Calibration, recipe: Recipe, source: Source, *, held_out: bool = False
) -> Calibration:
    own = sampling_of(source, loras=[lora.path for lora in recipe.model.loras])
    _require_video(wanted, own, source)
    of_model = {
        "prompts": own.held_out_prompts if held_out else own.prompts,
        "samples": own.samples,
        "steps": own.steps,
        "height": own.height,
        "width": own.width,
        "batch_size": own.batch_size,
        "max_sequence_length": own.max_sequence_length,
        "frames": own.frames,
        "fps": own.fps,
    }
    if wanted.guidance is None and wanted.true_cfg is None:
        of_model |= {"guidance": own.guidance, "true_cfg": own.true_cfg}
    filled = {name: value for name, value in of_model.items() if getattr(wanted, name) is None}
    return wanted.model_copy(update=filled)


def _require_video(wanted: Calibration, own: ModelSampling, source: Source) -> None:
    """UsageError for a number or rate of frames where the pipeline makes no videos: nothing would come of it."""
    given = [key for key in ("frames", "fps") if getattr(wanted, key) not in (None, getattr(own, key))]
    if source.pipeline is not None and given and makes_no_videos(source):
        name = pipeline_index(source.pipeline).get("_class_name")
        raise UsageError(
            f"{name} makes no videos: it takes no {' and no '.join(given)}",
            hint=f"leave it out: {', '.join(f'--{key}' for key in given)}, or {', '.join(given)} under calibration in "
            "the recipe",
        )


def sampling_for(recipe: Recipe, source: Source, *, beside: Path | None = None) -> Sampling:
    """What the calibration of a recipe samples, or the model's own where the recipe has none. Images that the pipeline
    reads are hashed here, once."""
    wanted = _with_model_sampling(recipe.calibration or Calibration(), recipe, source)
    samples, steps, height, width, batch = (
        int(value or 0)
        for value in (wanted.samples, wanted.steps, wanted.height, wanted.width, wanted.batch_size)
    )
    settings = SamplingSettings(
        steps=steps,
        guidance=wanted.guidance,
        height=height,
        width=width,
        seed=wanted.seed,
        max_sequence_length=wanted.max_sequence_length,
        batch_size=batch,
        true_cfg=wanted.true_cfg or 1.0,
        image=_images(wanted.image, beside),
        mask=_images(wanted.mask, beside),
        video=_videos(wanted.video, beside),
        frames=wanted.frames,
        fps=wanted.fps,
        strength=wanted.strength,
    )
    return Sampling(settings, samples, wanted.rows, wanted.size_bytes)


def has_frames(source: Source, settings: SamplingSettings) -> bool:
    """Whether what is sampled may be videos; False where it is known to be images."""
    return settings.frames != 1 and not makes_no_videos(source)


def usual_sampling(source: Source) -> Sampling:
    """How a model is sampled by default."""
    return sampling_for(default_recipe("model"), source)


def _images(path: str | None, beside: Path | None) -> tuple[ImageFile, ...]:
    return image_files(Path(find_source(path, beside)).expanduser()) if path else ()


def _videos(path: str | None, beside: Path | None) -> tuple[ImageFile, ...]:
    return video_files(Path(find_source(path, beside)).expanduser()) if path else ()
