"""`--plan`: what a conversion will take of time, memory and disk, before a weight is read.

Counts come from the plan (`solve.costs`, `tokens`), rates from this machine (`speed`). Nothing here reads weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from svdq_cli.calibrate.artefact import Calibration, open_calibration
from svdq_cli.calibrate.budget import rows_within, statistics_bytes
from svdq_cli.conversion.backoff import Need, Way, need_of, open_ways, stored_itemsize, too_large, ways_on
from svdq_cli.conversion.calibrating import input_widths
from svdq_cli.loading import compute_dtype
from svdq_cli.machine import resident_ram, resolve_device
from svdq_cli.preparing import (
    DEFAULT_OPTIONS,
    Prepared,
    RunOptions,
    disk_bytes,
    draw_settings,
    is_data_free,
    layer_counts,
    model_facts,
    predicted_sizes,
    prepare,
    rank_facts,
    warnings_of,
    work_bytes,
)
from svdq_cli.recipe import Recipe, resolved
from svdq_cli.records import PlanReport, PlanSeconds, SharedInput, W4A16Plan
from svdq_cli.solve.costs import Work, solve_work, waiting_bytes
from svdq_cli.speed import Speed, speed_of
from svdq_cli.tokens import forward_bytes, image_tokens, text_tokens
from svdq_cli.writing import existing

# diffusers' names of layers that read the text alone, in models with a stream for each
_TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")


@dataclass(frozen=True, slots=True)
class Forecast:
    """One conversion to be predicted."""

    prepared: Prepared
    artefact: Calibration | None  # statistics that were given
    draws: bool  # whether it draws its own
    device: torch.device
    options: RunOptions

    def rows(self, shared: SharedInput) -> int:
        """Calibration rows of an input, 0 for data-free."""
        if self.artefact is not None:
            entries = self.artefact.manifest.inputs
            return next((entry.rows for entry in entries if entry.name == shared.name), 0)
        wanted = self.prepared.recipe.calibration
        if not self.draws or wanted is None:
            return 0
        kept = rows_within(input_widths(self.prepared.plan), rows=wanted.rows, budget=wanted.size_bytes)
        plan = self.prepared.plan.layer(shared.layers[0])
        return min(kept, wanted.samples * wanted.steps * self.tokens(plan.name, isinstance(plan, W4A16Plan)))

    def tokens(self, layer: str, modulation: bool = False) -> int:
        """What a layer reads for one picture."""
        if modulation:
            return 1
        source = self.prepared.source
        settings = draw_settings(self.prepared.recipe, source, beside=self.options.beside)
        text = text_tokens(source, settings.max_sequence_length)
        picture = image_tokens(source, height=settings.height, width=settings.width) * (settings.frames or 1)
        if any(part in _TEXT_LAYERS for part in layer.split(".")):
            return text
        joint = not any(_TEXT_LAYERS[0] in name for name in _block_of(self.prepared, layer))
        return picture + (text if joint and source.component == "transformer" else 0)


def predict(
    recipe: Recipe, *, calibration: Path | None = None, options: RunOptions = DEFAULT_OPTIONS
) -> PlanReport:
    """What a conversion would write and take, from names, shapes and this machine's speed."""
    started = time.monotonic()
    prepared = prepare(recipe, beside=options.beside)
    preparing = time.monotonic() - started
    data_free = is_data_free(recipe, calibration)
    device = resolve_device(options.device)
    artefact = open_calibration(calibration) if calibration and not data_free else None
    job = Forecast(prepared, artefact, not data_free and artefact is None, device, options)
    out = Path(recipe.outputs[0].path) if recipe.outputs else Path()
    stages = stage_seconds(job, speed_of(device, compute_dtype(device), existing(out)), preparing)
    return PlanReport(
        model=model_facts(prepared, None),
        read_as=prepared.source.kind,
        precision=recipe.quantization.precision,
        effort=recipe.quantization.effort,
        rank=rank_facts(prepared),
        layers=layer_counts(prepared.plan),
        bytes=predicted_sizes(prepared),
        disk_bytes=peak_disk_bytes(job),
        seconds=stages.total,
        ram_bytes=ram_bytes(job),
        vram_bytes=vram_bytes(job),
        recipe=resolved(recipe),
        warnings=(*warnings_of(prepared, data_free=data_free), *_left_out(job), *_on_the_cpu(job)),
        stages=stages,
    )


def _left_out(job: Forecast) -> tuple[str, ...]:
    """What is not predicted."""
    if job.prepared.recipe.quantization.effort != "best":
        return ()
    return ("the time and memory of effort best's block reconstruction are not predicted",)


# ------------------------------------------------------------------------------------------------- time


def stage_seconds(job: Forecast, speed: Speed, preparing: float) -> PlanSeconds:
    """`preparing`: what it took to make the plan, which the conversion does once more."""
    prepared = job.prepared
    source, packed = prepared.source.bytes, sum(t.bytes(prepared.inventory.state) for t in prepared.targets)
    digest = source / speed.hashed + source / speed.read
    calibrate = _calibrate_seconds(job, speed) if job.draws else 0.0
    kept = work_bytes(prepared.plan, prepared.settings.dtype)
    solve = speed.solve.seconds(_solve_work(job)) + kept / speed.write
    weights = sum(layer.linear.in_features * layer.linear.out_features for layer in prepared.plan.layers)
    unpacked = len(prepared.targets) * speed.solve.seconds(
        Work(compared=weights)
    )  # takes as long as to compare
    pack = unpacked + disk_bytes(prepared) / speed.write + packed / speed.hashed
    check = 2 * unpacked + (len(prepared.targets) * source + packed) / speed.read
    total = preparing + digest + calibrate + solve + pack + check
    return PlanSeconds(preparing + digest, calibrate, solve, pack, check, total)


def _solve_work(job: Forecast) -> Work:
    plans = {layer.name: layer for layer in job.prepared.plan.layers}
    total = Work()
    for shared in job.prepared.plan.inputs:
        rows = job.rows(shared)
        total += solve_work(shared, plans, job.prepared.settings, rows=rows)
        if (
            job.prepared.recipe.quantization.rank == "auto"
        ):  # the search for ranks is about as long as the paper's
            total += solve_work(shared, plans, replace(job.prepared.settings, steps=()), rows=rows)
    return total


def _calibrate_seconds(job: Forecast, speed: Speed) -> float:
    """All pictures and one step to see what runs; loading and keeping of what is read and kept."""
    prepared = job.prepared
    wanted = prepared.recipe.calibration
    assert wanted is not None
    settings = draw_settings(prepared.recipe, prepared.source, beside=job.options.beside)
    passes = (wanted.samples * settings.steps + 1) * (2 if settings.true_cfg > 1 else 1)
    flops, calls = 0.0, 0
    for layer in prepared.plan.layers:
        tokens = job.tokens(layer.name, isinstance(layer, W4A16Plan))
        flops += 2 * tokens * layer.linear.in_features * layer.linear.out_features
        calls += 15  # of torch: the layer, its hook, and its share of norms, activations and attention
    statistics = statistics_bytes(input_widths(prepared.plan), rows=wanted.rows)
    loading = (prepared.source.bytes + other_bytes(job)) / speed.read
    return (
        passes * (flops / speed.forward + calls / speed.solve.calls) + loading + 2 * statistics / speed.write
    )


def other_bytes(job: Forecast) -> int:
    """Of the pipeline's other components, as they are stored."""
    pipeline = job.prepared.source.pipeline
    if pipeline is None:
        return 0
    files = pipeline.glob("*/*.safetensors")
    return sum(file.stat().st_size for file in files if file.parent.name != job.prepared.source.component)


# ------------------------------------------------------------------------------------------------- memory and disk


def ram_bytes(job: Forecast) -> int:
    """Peak of the process: what it holds now, with everything imported, and the largest stage's needs."""
    stages = [
        0,
        *(_waiting_bytes(job, portion) + _planned(job, portion)[1].ram for portion in _portions(job)),
    ]
    if job.draws:
        stages += _calibration_stages(job, cpu=job.device.type == "cpu")
    return resident_ram() + max(stages)


def vram_bytes(job: Forecast) -> int | None:
    """Peak of torch's allocator; None without a GPU."""
    if job.device.type != "cuda":
        return None
    stages = [_planned(job, portion)[1].vram for portion in _portions(job)]
    if job.draws:
        stages += _calibration_stages(job, cpu=True)
    peak = max(stages)
    return peak if job.options.max_vram is None else min(peak, job.options.max_vram)


def require_memory(job: Forecast) -> None:
    """OutOfResourcesError for a portion that can't be solved in the memory there is, `--max-ram` and `--max-vram` kept.
    (What calibration may take is settled where the model is loaded.)"""
    for portion in _portions(job):
        needs = _needs(job, portion)
        if not open_ways(ways_on(job.device), needs.__getitem__, job.options):
            raise too_large(portion.layers[0], needs.__getitem__, job.device, job.options)


def _on_the_cpu(job: Forecast) -> tuple[str, ...]:
    """A warning of layers that `--max-vram` leaves no room for."""
    moved = [portion for portion in _portions(job) if _planned(job, portion)[0].device != job.device]
    if not moved:
        return ()
    count = sum(len(portion.layers) for portion in moved)
    return (
        f"{count} layers will be solved on the CPU, which takes longer than is predicted: --max-vram has no room for "
        f"them (the first is {moved[0].layers[0]})",
    )


def _portions(job: Forecast) -> tuple[SharedInput, ...]:
    return job.prepared.plan.portions


def _needs(job: Forecast, portion: SharedInput) -> dict[Way, Need]:
    plans = {name: job.prepared.plan.layer(name) for name in portion.layers}
    need = partial(
        need_of,
        portion=portion,
        plans=plans,
        settings=job.prepared.settings,
        rows=job.rows(portion),
        itemsize=stored_itemsize(job.prepared),
    )
    return {way: need(way) for way in ways_on(job.device)}


def _planned(job: Forecast, portion: SharedInput) -> tuple[Way, Need]:
    """The fastest way that fits, or the most sparing one where none does; and what it needs."""
    needs = _needs(job, portion)
    ways = ways_on(job.device)
    way = (*open_ways(ways, needs.__getitem__, job.options), ways[-1])[0]
    return way, needs[way]


def _waiting_bytes(job: Forecast, portion: SharedInput) -> int:
    plans = {name: job.prepared.plan.layer(name) for name in portion.layers}
    pinned = job.device.type == "cuda"
    return waiting_bytes(portion, plans, itemsize=stored_itemsize(job.prepared), pinned=pinned)


def _calibration_stages(job: Forecast, *, cpu: bool) -> list[int]:
    """The text encoders with the rest of the pipeline, then the denoiser with its activations. `cpu`: whether they
    compute where the memory is asked for."""
    itemsize = compute_dtype(job.device).itemsize
    others = other_bytes(job) * itemsize // 2  # stored in 16 bits
    prepared = job.prepared
    if not cpu:
        return [others]
    settings = draw_settings(prepared.recipe, prepared.source, beside=job.options.beside)
    source = prepared.source
    picture = image_tokens(source, height=settings.height, width=settings.width) * (settings.frames or 1)
    tokens = settings.batch_size * (picture + text_tokens(source, settings.max_sequence_length))
    activations = forward_bytes(prepared.inventory.linears, tokens=tokens, itemsize=itemsize)
    denoiser = prepared.plan.parameters * itemsize
    return [others, denoiser + activations]


def peak_disk_bytes(job: Forecast) -> int:
    """What lies on the disk at its fullest: statistics that were drawn, twice while the parts of batches are merged; or
    once, with the solved layers and the outputs."""
    wanted = job.prepared.recipe.calibration
    statistics = 0
    if job.draws and wanted is not None:
        statistics = sum(
            8 * width + 2 * width * job.rows(shared)
            for width, shared in zip(input_widths(job.prepared.plan), job.prepared.plan.inputs, strict=True)
        )
    kept = work_bytes(job.prepared.plan, job.prepared.settings.dtype)
    return max(2 * statistics, statistics + kept + disk_bytes(job.prepared))


def _block_of(prepared: Prepared, layer: str) -> list[str]:
    """All layers of the block that a layer is in."""
    parts = layer.split(".")
    end = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    prefix = ".".join(parts[: end + 1])
    return [linear.name for linear in prepared.inventory.linears if linear.name.startswith(f"{prefix}.")]
