"""`svdq calibrate`: the 16-bit model draws the calibration prompts, and what its layers read is kept."""

from __future__ import annotations

import time
from pathlib import Path

from svdq_cli import __version__
from svdq_cli.calibrate.artefact import CalibrationFacts, save_calibration
from svdq_cli.calibrate.prompts import prompts_digest
from svdq_cli.errors import InputError, UsageError
from svdq_cli.loading import load_16bit_pipeline
from svdq_cli.machine import resolve_device
from svdq_cli.preparing import DEFAULT_OPTIONS, Prepared, RunOptions, chosen_prompts, draw_settings, prepare
from svdq_cli.recipe import Recipe
from svdq_cli.records import ActivationStats, CalibrateReport, Observer, ignore_events
from svdq_cli.source import source_digest
from svdq_cli.writing import refuse_existing


def calibrate(
    recipe: Recipe, out: Path, *, options: RunOptions = DEFAULT_OPTIONS, observe: Observer = ignore_events
) -> CalibrateReport:
    """Draw the calibration prompts with the 16-bit model and keep what its layers saw."""
    started = time.monotonic()
    refuse_existing(out, overwrite=options.overwrite)
    prepared = prepare(recipe, beside=options.beside, every_layer=True)
    stats, facts = draw_statistics(prepared, options, observe, source_sha256=source_digest(prepared.source))
    manifest = save_calibration(out, stats, facts, overwrite=options.overwrite)
    return CalibrateReport(
        path=str(out),
        inputs=len(stats),
        prompts=facts.prompts_count,
        steps=facts.settings.steps,
        tokens_seen=sum(item.tokens_seen for item in stats.values()),
        bytes=manifest.bytes,
        digest=manifest.digest,
        seconds=time.monotonic() - started,
    )


def draw_statistics(
    prepared: Prepared, options: RunOptions, observe: Observer, *, source_sha256: str
) -> tuple[dict[str, ActivationStats], CalibrationFacts]:
    """Statistics of every planned input, and where they come from. Raises UsageError without prompts, InputError
    where there is no pipeline to draw with."""
    from svdq_cli.calibrate.collect import collect_stats

    wanted = prepared.recipe.calibration
    if wanted is None:
        raise UsageError("the recipe names no calibration prompts", hint="give --prompts FILE")
    if prepared.source.pipeline is None:
        raise InputError(
            f"{prepared.source.path}: calibration draws pictures, and this is one component, not a pipeline",
            hint="give the pipeline that it belongs to (--base FOLDER_OR_HUB_ID), or use --effort datafree",
            where=str(prepared.source.path),
        )
    prompts = chosen_prompts(prepared.recipe, options, observe)
    settings = draw_settings(prepared.recipe, prepared.source, beside=options.beside)
    device = resolve_device(options.device)
    pipe = load_16bit_pipeline(prepared.source, class_name=prepared.plan.model_class, device=device)
    model = getattr(pipe, prepared.source.component)
    stats = collect_stats(
        pipe, model, prepared.plan.inputs, prompts, draw=settings, rows=wanted.rows, observe=observe
    )
    facts = CalibrationFacts(
        svdq_version=__version__,
        model_class=prepared.plan.model_class,
        family=prepared.plan.family,
        source_sha256=source_sha256,
        settings=settings,
        prompts_sha256=prompts_digest(prompts),
        prompts_count=len(prompts),
    )
    return stats, facts
