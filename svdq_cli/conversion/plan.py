"""`--plan`: the report of what a conversion would write and take, on this machine and on a card that `--gpu` names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from svdq_cli.conversion.machine_speed import Speed, speed_of
from svdq_cli.conversion.needs import given_statistics, needs_of, require_blocks_run, require_parts
from svdq_cli.conversion.plan_gpu import on_card
from svdq_cli.conversion.predict import (
    Forecast,
    affordable_needs,
    disk_needs,
    on_the_cpu,
    peak_disk_bytes,
    ram_bytes,
    require_memory,
    stage_seconds,
    vram_bytes,
)
from svdq_cli.conversion.preflight import require_own_places
from svdq_cli.conversion.provenance import contents_before
from svdq_cli.conversion.resume import require_new, work_beside
from svdq_cli.conversion.size_budget import require_search
from svdq_cli.conversion.solve_layers import layer_groups_at_once
from svdq_cli.conversion.work_folder import kept_bytes
from svdq_cli.errors import OutOfResourcesError
from svdq_cli.inference.backend import compute_dtype
from svdq_cli.prepare.facts import encoders_planned, layer_counts, model_facts, predicted_sizes, rank_facts
from svdq_cli.prepare.from_command_line import outputs_of
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared, prepare, warnings_of
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.prepare.sampling import Sampling, usual_sampling
from svdq_cli.recipe import Recipe, resolved, user_path
from svdq_cli.records import Event
from svdq_cli.reports import ErrorFacts, GpuFacts, PlanReport, PromptFacts, SampledFacts, error_facts
from svdq_cli.sampling.token_counts import image_tokens, latent_frames
from svdq_cli.storage.atomic import existing, require_disk
from svdq_cli.storage.library_facts import spared_cost
from svdq_cli.storage.output_paths import name_warnings, require_name
from svdq_cli.system.allocator import return_freed_memory
from svdq_cli.system.graphics_cards import Card
from svdq_cli.system.machine import resolve_device
from svdq_cli.system.threads import torch_threads


def predict(
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    card: Card | None = None,
) -> PlanReport:
    """What a conversion would write and take, from names, shapes and this machine's speed.

    `card`: also what converting and generating would take on it; this machine need not have it.
    """
    started = time.monotonic()
    prepared, paths = _prepared(recipe, calibration, options)
    # a conversion asks diffusers, whatever this process knows without
    preparing = time.monotonic() - started + spared_cost().seconds
    prompts: PromptFacts | None = None
    told: list[Event] = []
    given = given_statistics(recipe, calibration)
    if sampling := needs_of(prepared, given).prompts:
        prompts = chosen_prompts(prepared.recipe, options, told.append).facts
        prepared = replace(prepared, sampling=replace(sampling, samples=prompts.used))
    device = resolve_device(options.device)
    needs = needs_of(prepared, given)
    require_parts(prepared, needs)
    require_blocks_run(prepared, needs)
    budget = require_search(prepared, needs, lambda: contents_before(prepared, options))
    job, without = _affordable(Forecast(prepared, needs, device, options), card)
    error = None if card else _shortage(job, paths)
    at_once = layer_groups_at_once(device)
    speed = _measured_speed(device, existing(paths[0] if paths else Path()), at_once)
    stages = stage_seconds(job, speed, preparing, at_once=max(1, at_once))
    return PlanReport(
        model=model_facts(prepared, None),
        read_as=prepared.source.kind,
        precision=recipe.quantization.precision,
        effort=recipe.quantization.effort,
        rank=rank_facts(prepared),
        layers=layer_counts(prepared.plan),
        bytes=predicted_sizes(prepared),
        disk_bytes=peak_disk_bytes(job),
        disk_kept_bytes=_kept_bytes(paths, options),
        seconds=stages.total,
        ram_bytes=ram_bytes(job),
        vram_bytes=vram_bytes(job),
        recipe=resolved(prepared.recipe),
        warnings=(
            *warnings_of(prepared, data_free=job.needs.data_free),
            *_output_names(prepared, recipe),
            *(event.detail for event in told if event.kind == "warning"),
            *(*without, *on_the_cpu(job), *_limit_without_gpu(options, device, card)),
        ),
        stages=stages,
        prompts=prompts,
        sampling=_sampled(prepared, images) if (images := job.needs.images) else None,
        text_encoders=encoders_planned(prepared),
        size_budget=budget,
        error=error,
        status="error" if error else "planned",
        gpu=_on_card(job, card, speed, preparing) if card else None,
    )


def _prepared(
    recipe: Recipe, calibration: Path | None, options: RunOptions
) -> tuple[Prepared, tuple[Path, ...]]:
    """The recipe's model, and where its outputs are to be written, which is refused as a conversion refuses it; no
    places where none are named."""
    named = any(output.path for output in recipe.outputs)
    paths = outputs_of(recipe) if named else ()
    for path in paths:
        require_name(path)
    replaces = bool(paths) and require_new(paths, options)
    prepared = prepare(recipe, beside=options.beside)
    if paths:
        require_own_places(prepared, paths, calibration, overwrite=replaces)
    return prepared, paths


def _on_card(job: Forecast, card: Card, speed: Speed, preparing: float) -> GpuFacts:
    settings = (job.prepared.sampling or usual_sampling(job.prepared.source)).settings
    return on_card(job, card, settings, speed, preparing=preparing)


def _affordable(job: Forecast, card: Card | None) -> tuple[Forecast, tuple[str, ...]]:
    """The conversion with what this machine has the memory for, and warnings of what is left out; as it is where the
    machine of another card converts."""
    if card is not None:
        return job, ()
    needs, without = affordable_needs(job)
    return replace(job, needs=needs), without


def _shortage(job: Forecast, paths: Sequence[Path]) -> ErrorFacts | None:
    """For want of what memory or disk this machine would refuse the conversion before its first layer."""
    try:
        require_memory(job)
        if paths:
            work = work_beside(paths[0], job.options)
            require_disk(disk_needs(job, paths, work))
    except OutOfResourcesError as error:
        return error_facts(error, error.code)
    return None


def _kept_bytes(paths: Sequence[Path], options: RunOptions) -> int:
    """Of the unfinished run that `--resume` goes on with."""
    return kept_bytes(work_beside(paths[0], options)) if paths and options.resume else 0


def _measured_speed(device: torch.device, folder: Path, at_once: int) -> Speed:
    """This machine's, where so many layer groups are solved side by side, each with one thread."""
    with torch_threads(1 if at_once else torch.get_num_threads()):
        speed = speed_of(device, compute_dtype(device), folder)
    return_freed_memory()  # of measuring: what this process holds now is what a conversion begins with
    return replace(speed, forward=speed.forward * max(1, at_once))  # which has all cores


def _output_names(prepared: Prepared, recipe: Recipe) -> tuple[str, ...]:
    named = [
        (user_path(output.path), not target.format.single_file)
        for output, target in zip(recipe.outputs, prepared.targets, strict=False)
        if output.path
    ]
    return name_warnings([path for path, _ in named], folders=[is_folder for _, is_folder in named])


def _sampled(prepared: Prepared, sampling: Sampling) -> SampledFacts:
    settings = sampling.settings
    image = image_tokens(prepared.source, height=settings.height, width=settings.width)
    tokens = image * latent_frames(prepared.source, settings.frames)
    return SampledFacts(settings.width, settings.height, settings.frames or 1, settings.steps, tokens)


def _limit_without_gpu(options: RunOptions, device: torch.device, card: Card | None) -> tuple[str, ...]:
    if options.max_vram is None or device.type != "cpu" or card is not None:
        return ()
    return ("--max-vram has no effect: this plan is for the CPU. --gpu NAME or --gpu 24GB plans for a GPU",)
