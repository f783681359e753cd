"""Drawing with a checkpoint: how it is drawn by default, and `generate`, one picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from svdq_cli.calibrate.pipelines import draw
from svdq_cli.checkpoint import Checkpoint, open_checkpoint
from svdq_cli.loading import Backend, load_pipeline
from svdq_cli.machine import resolve_device
from svdq_cli.placing import require_picture_place
from svdq_cli.preparing import DEFAULT_OPTIONS, RunOptions, sampling_for
from svdq_cli.recipe import Calibration, Recipe, default_recipe
from svdq_cli.records import GenerateReport, Observer, following_seed, ignore_events
from svdq_cli.writing import disk_errors, refuse_existing

EVALUATION_SAMPLES = 16
SEED_DISTANCE = 1000  # from the seeds of calibration


def evaluation_recipe(checkpoint: Checkpoint, source: str) -> Recipe:
    """How a checkpoint is judged by default: sampled as it was calibrated or, where it was not, as its model is; on
    prompts that calibration has not seen (left open: `with_model_sampling` fills them in)."""
    made_with = (checkpoint.provenance or {}).get("recipe")
    known = Recipe.model_validate(made_with) if isinstance(made_with, Mapping) else default_recipe(source)
    base = known.calibration or Calibration()
    update = {
        "prompts": None,
        "samples": EVALUATION_SAMPLES,
        "seed": following_seed(base.seed, SEED_DISTANCE),
    }
    return known.model_copy(
        update={
            "model": known.model.model_copy(update={"source": source}),
            "calibration": base.model_copy(update=update),
        }
    )


def generate(
    path: Path,
    prompt: str,
    out: Path,
    *,
    recipe: Recipe,
    backend: str = "auto",
    width: int | None = None,
    height: int | None = None,
    base: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> GenerateReport:
    """One picture from a checkpoint, drawn as `recipe` says. `base`: see `load_pipeline`."""
    refuse_existing(out, overwrite=options.overwrite)
    require_picture_place(out, inputs=[path], overwrite=options.overwrite)
    started = time.monotonic()
    pipe = load_pipeline(path, device=resolve_device(options.device), backend=backend, base=base)
    source = open_checkpoint(path).source
    settings = sampling_for(recipe, replace(source, pipeline=base or source.pipeline)).settings
    settings = replace(
        settings, width=width or settings.width, height=height or settings.height, batch_size=1
    )
    (picture,) = draw(pipe, [prompt], settings=settings, observe=observe)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.stem}.partial{out.suffix}")
        picture.save(partial)
        partial.replace(out)
    facts: Backend = pipe.svdq_backend  # type: ignore[attr-defined]
    return GenerateReport(
        path=str(out),
        backend=f"{facts.name}: {facts.reason}",
        seconds=time.monotonic() - started,
        width=picture.width,
        height=picture.height,
    )
