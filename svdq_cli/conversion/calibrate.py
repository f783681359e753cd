"""`svdq calibrate`: the 16-bit model generates images for the calibration prompts, and statistics of what its layers
read are kept.

The text encoders run first and are freed. The denoiser is whole on the device where it fits, else its blocks are
brought there when they run. What every batch of images adds is kept in the work folder, so that a run that is stopped
continues with the next batch, and merged when all are there: the bits do not depend on where weights were stored or
when a run stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from svdq_cli import __version__
from svdq_cli.calibration.artefact import (
    CalibrationFacts,
    CalibrationManifest,
    is_calibration,
    save_calibration,
)
from svdq_cli.calibration.collect import collect_parts
from svdq_cli.calibration.over_time import inputs_over_time, modulation_inputs
from svdq_cli.calibration.parts import MergedStats, PartFolder
from svdq_cli.calibration.prompts import prompts_digest
from svdq_cli.calibration.row_sampling import RowSampling
from svdq_cli.conversion.kept_tokens import KeptTokens, kept_tokens, token_limits
from svdq_cli.conversion.memory import run_as_it_fits
from svdq_cli.conversion.resume import kept_work, wait_for_files, work_beside
from svdq_cli.conversion.work_folder import Identity, WorkFolder, kept_bytes, remove_finished
from svdq_cli.errors import InputError, UsageError
from svdq_cli.inference.load import load_without_denoiser
from svdq_cli.pipelines.batches import Batch, split_batches
from svdq_cli.pipelines.encode import encode_prompts
from svdq_cli.pipelines.joint import joint_model
from svdq_cli.pipelines.settings import SamplingSettings, settings_json
from svdq_cli.prepare.facts import inputs_of
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared, counts_of, prepare, prompts_of
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.recipe import Recipe
from svdq_cli.records import Observer, ignore_events
from svdq_cli.reports import CalibrateReport
from svdq_cli.source import components_digest, source_digest
from svdq_cli.source.whole import require_whole
from svdq_cli.storage.atomic import refuse_existing, require_disk
from svdq_cli.storage.output_paths import require_places
from svdq_cli.system.machine import resolve_device

BEGUN = "begun"  # topic: where the work is
GENERATED = "generated"  # topic: a process has generated its images


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """The prompts and settings of a calibration, and how much of its activations is kept."""

    prepared: Prepared
    prompts: tuple[str, ...]
    settings: SamplingSettings
    rows: int  # of every input, at most
    covariance_tokens: tuple[int, ...]  # of every input, at most; 0 where its covariance is not taken
    facts: CalibrationFacts

    @property
    def kept(self) -> KeptTokens:
        """What it keeps of those at most, since there are no more tokens."""
        wanted = replace(require_generating(self.prepared), samples=len(self.prompts))
        return kept_tokens(self.prepared, wanted, counts_of(self.prepared, self.settings))

    @property
    def spread(self) -> RowSampling:
        names = (shared.name for shared in self.prepared.plan.inputs)
        tokens = dict(zip(names, self.covariance_tokens, strict=True))
        return RowSampling(self.rows, len(self.prompts), self.settings.seed, tokens)


def calibrate(
    recipe: Recipe, out: Path, *, options: RunOptions = DEFAULT_OPTIONS, observe: Observer = ignore_events
) -> CalibrateReport:
    """Generate images for the calibration prompts with the 16-bit model; keep statistics of its layers' inputs."""
    started = time.monotonic()
    folder = work_beside(out, options)
    remove_finished(folder)
    refuse_existing(out, overwrite=options.overwrite)
    prepared = prepare(recipe, beside=options.beside, every_layer=True)
    require_places(
        [out],
        folders=[True],
        inputs=inputs_of(prepared, None),
        overwrite=options.overwrite,
        replaceable=is_calibration,
    )
    require_generating(prepared)
    prepared = replace(prepared, prompts=prompts_of(prepared, options, observe))
    calibration_run = calibration_run_of(
        prepared, options, observe, source_sha256=source_digest(prepared.source)
    )
    most = calibration_run.kept
    require_disk({out: most.bytes, folder: max(0, most.part_bytes - kept_bytes(folder))})

    def kept(work: WorkFolder) -> str:
        return f"{len(PartFolder(work.images))} of {len(_batches(calibration_run))} batches of images"

    with kept_work(
        folder,
        _identity(calibration_run, options),
        options=options,
        stage="calibrate",
        kept=kept,
        observe=observe,
    ) as work:
        begun = {"work": str(work.path.resolve()), "source_sha256": calibration_run.facts.source_sha256}
        options.team.broadcast(BEGUN, begun)
        manifest = collect_calibration(out, calibration_run, work, options=options, observe=observe)
    return CalibrateReport(
        path=str(out),
        inputs=len(manifest.inputs),
        prompts=manifest.facts.prompts_count,
        steps=manifest.facts.settings.steps,
        tokens_seen=sum(entry.tokens_seen for entry in manifest.inputs),
        bytes=manifest.bytes,
        digest=manifest.digest,
        seconds=time.monotonic() - started,
        covariances=sum(entry.covariance_tokens > 0 for entry in manifest.inputs),
    )


def require_generating(prepared: Prepared) -> Sampling:
    """What it samples. UsageError without prompts, InputError where there is no whole pipeline to generate with."""
    wanted = prepared.sampling
    if wanted is None:
        raise UsageError("the recipe names no calibration prompts", hint="give --prompts FILE")
    if prepared.source.pipeline is None:
        raise InputError(
            f"{prepared.source.path}: calibration generates images, but this is one component, not a pipeline",
            hint="give the pipeline it belongs to (--base FOLDER_OR_HUB_ID), or use --effort datafree",
            where=str(prepared.source.path),
        )
    require_whole(prepared.source.pipeline, skip=prepared.source.components)
    return wanted


def calibration_run_of(
    prepared: Prepared, options: RunOptions, observe: Observer, *, source_sha256: str
) -> CalibrationRun:
    """The calibration that the recipe asks for. Raises as `require_generating`, and InputError for prompts that
    can't be read."""
    wanted = require_generating(prepared)
    prompts = prompts_of(prepared, options, observe).texts
    settings = wanted.settings
    facts = CalibrationFacts(
        svdq_version=__version__,
        model_class=prepared.plan.model_class,
        family=prepared.plan.family,
        source_sha256=source_sha256,
        settings=settings,
        prompts_sha256=prompts_digest(prompts),
        prompts_count=len(prompts),
    )
    rows, tokens = token_limits(prepared, wanted)
    return CalibrationRun(prepared, prompts, settings, rows, tuple(tokens), facts)


def collect_calibration(
    out: Path, calibration_run: CalibrationRun, work: WorkFolder, *, options: RunOptions, observe: Observer
) -> CalibrationManifest:
    """Generates what the work folder lacks, and writes the artefact from all of it. Other processes take their part
    of the images in `generate_share`."""
    generate_share(calibration_run, work, options=options, observe=observe)
    options.team.gather(GENERATED)
    parts = PartFolder(work.images)
    wait_for_files(work.path, lambda: [b.first for b in _batches(calibration_run) if b.first not in parts])
    names = [shared.name for shared in calibration_run.prepared.plan.inputs]
    manifest = save_calibration(
        out, MergedStats(parts, names), calibration_run.facts, overwrite=options.overwrite
    )
    parts.clear()
    return manifest


def generate_share(
    calibration_run: CalibrationRun, work: WorkFolder, *, options: RunOptions, observe: Observer
) -> None:
    """Generate this process's share of the images that the work folder lacks."""
    parts = PartFolder(work.images)
    mine = options.team.share(_batches(calibration_run))
    if any(batch.first not in parts for batch in mine):
        _generate(calibration_run, mine, parts, options, observe)
    options.team.done(GENERATED)


def _generate(
    calibration_run: CalibrationRun,
    batches: Sequence[Batch],
    parts: PartFolder,
    options: RunOptions,
    observe: Observer,
) -> None:
    source, plan, settings = (
        calibration_run.prepared.source,
        calibration_run.prepared.plan,
        calibration_run.settings,
    )
    device = resolve_device(options.device)
    pipe = load_without_denoiser(source, class_name=plan.model_class, device=device)
    left = [batch for batch in batches if batch.first not in parts]
    encoded = encode_prompts(pipe, left, settings=settings, observe=observe)

    looks_over_time = _looks_over_time(calibration_run, batches) and not parts.has_over_time

    def collect() -> None:
        model = joint_model(pipe, source.components)
        if looks_over_time:
            found = inputs_over_time(
                pipe, model, modulation_inputs(plan), left[0], settings=settings, encoded=encoded
            )
            parts.keep_over_time(found)
        collect_parts(
            pipe,
            model,
            plan.inputs,
            batches,
            sampling=settings,
            spread=calibration_run.spread,
            parts=parts,
            encoded=encoded,
            observe=observe,
        )

    run_as_it_fits(
        pipe,
        calibration_run.prepared,
        settings,
        collect,
        device=device,
        options=options,
        stage="calibrate",
        observe=observe,
    )


def _looks_over_time(calibration_run: CalibrationRun, mine: Sequence[Batch]) -> bool:
    """Whether this process looks for inputs that depend on time alone: the first one, where a recipe takes curves."""
    prepared = calibration_run.prepared
    first = not mine or mine[0].first == 0
    return first and prepared.recipe.modulation in ("auto", "curve") and len(prepared.source.components) == 1


def _batches(calibration_run: CalibrationRun) -> tuple[Batch, ...]:
    return split_batches(calibration_run.prompts, settings=calibration_run.settings)


def _identity(calibration_run: CalibrationRun, options: RunOptions) -> Identity:
    """Everything that a batch's statistics depend on."""
    return {
        "svdq version": __version__,
        "torch version": torch.__version__,
        "device": resolve_device(options.device).type,
        "model sha256": calibration_run.facts.source_sha256,
        "calibration": {
            "prompts sha256": calibration_run.facts.prompts_sha256,
            "pipeline sha256": components_digest(calibration_run.prepared.source),
            "rows": calibration_run.rows,
            "covariance tokens": list(calibration_run.covariance_tokens),
            **settings_json(calibration_run.settings),
        },
        "inputs": [shared.name for shared in calibration_run.prepared.plan.inputs],
    }
