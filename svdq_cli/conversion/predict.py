"""What a conversion will take of time, memory and disk, before a weight is read.

Counts come from the plan (`solve.costs`, `sampling.token_counts`), rates from this machine
(`conversion.machine_speed`). Nothing here reads weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from svdq_cli.conversion.block_forecast import BlockForecast, block_forecast, hidden_state_bytes
from svdq_cli.conversion.encoder_weights import calibration_bytes, encoder_work
from svdq_cli.conversion.kept_tokens import KeptTokens, kept_tokens
from svdq_cli.conversion.machine_speed import Speed
from svdq_cli.conversion.memory import free_ram, free_vram, reserved_ram
from svdq_cli.conversion.memory_backoff import (
    MemoryNeed,
    Placement,
    memory_need,
    open_placements,
    placements_on,
    stored_itemsize,
    too_large,
)
from svdq_cli.conversion.needs import GivenStatistics, Needs
from svdq_cli.conversion.record import output_sample, tuning_sample
from svdq_cli.conversion.solve_layers import SPARED, layer_groups_at_once
from svdq_cli.conversion.work_folder import CALIBRATION, kept_bytes, solved_bytes
from svdq_cli.errors import OutOfResourcesError
from svdq_cli.inference.backend import compute_dtype
from svdq_cli.prepare.facts import other_components_bytes, other_weights
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, counts_of
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.records import (
    ModelPlan,
    SharedInput,
)
from svdq_cli.reports import PlanSeconds
from svdq_cli.sampling.token_counts import TokenCounts
from svdq_cli.solve.costs import packed_bytes, solve_work, waiting_bytes
from svdq_cli.solve.work import Work
from svdq_cli.source import take_turns

# what a pipeline's other parts take to import and build, over what diffusers and the plan take
STARTING = 0.3


@dataclass(frozen=True, slots=True)
class Images:
    """Images that are generated for statistics: the tokens that each layer reads for one, and those that are kept."""

    sampling: Sampling
    tokens: TokenCounts
    kept: KeptTokens


# Without slots: what is cached is kept in the instance
@dataclass(frozen=True)
class Forecast:
    """One conversion to be predicted."""

    prepared: Prepared
    needs: Needs
    device: torch.device
    options: RunOptions

    def rows(self, shared: SharedInput) -> int:
        """Calibration rows of an input, 0 for data-free."""
        if isinstance(given := self.needs.statistics, GivenStatistics):
            entries = given.artefact.manifest.inputs
            return next((entry.rows for entry in entries if entry.name == shared.name), 0)
        return self.images.kept.rows[shared.name] if self.images else 0

    @cached_property
    def covariance_tokens(self) -> dict[str, int]:
        """By input, over how many tokens its covariance is taken; 0 for none."""
        if isinstance(given := self.needs.statistics, GivenStatistics):
            return {entry.name: entry.covariance_tokens for entry in given.artefact.manifest.inputs}
        if self.images is None:
            return {shared.name: 0 for shared in self.prepared.plan.inputs}
        return dict(self.images.kept.covariance_tokens)

    @cached_property
    def images(self) -> Images | None:
        """The images of its own statistics; None where it has none of its own."""
        wanted = self.needs.calibrates
        if wanted is None:
            return None
        tokens = counts_of(self.prepared, wanted.settings)
        return Images(wanted, tokens, kept_tokens(self.prepared, wanted, tokens))

    @cached_property
    def tuning(self) -> BlockForecast | None:
        """The tuning of the model; None where it is not tuned."""
        wanted = self.needs.tuning
        return wanted and block_forecast(
            self.prepared, wanted, tuning_sample(self.prepared, wanted), self.device
        )

    @cached_property
    def output(self) -> BlockForecast | None:
        """The way through the blocks, to fit what comes behind them; None where it is not gone."""
        if (wanted := self.needs.output) is None:
            return None
        sample = output_sample(self.prepared, wanted)
        return block_forecast(self.prepared, wanted, sample, self.device, tuned=False)

    @property
    def ways(self) -> tuple[BlockForecast, ...]:
        """Both, one after the other, as far as they are needed."""
        return tuple(way for way in (self.tuning, self.output) if way)

    def waiting_bytes(self, way: BlockForecast) -> int:
        """Bytes of host memory that hidden states take on a way through the blocks."""
        return min(way.passed_bytes, hidden_state_bytes(way, self.options, self.device))


# ------------------------------------------------------------------------------------------------- time


def stage_seconds(job: Forecast, speed: Speed, preparing: float, *, at_once: int = 1) -> PlanSeconds:
    """`preparing`: what it took to make the plan, which the conversion does once more. `at_once`: layer groups that are
    solved side by side, each at this `speed`."""
    prepared = job.prepared
    source, packed = prepared.source.bytes, sum(t.bytes(prepared.inventory.state) for t in prepared.targets)
    digest = source / speed.hashed + source / speed.read
    calibrate = _calibrate_seconds(job, job.images, speed) + STARTING * preparing if job.images else 0.0
    kept = work_bytes(prepared.plan, prepared.settings.dtype)
    solve = speed.solve.seconds(_solve_work(job)) / at_once + kept / speed.write
    for plan in prepared.encoders:
        solve += speed.solve.seconds(encoder_work(plan, calibrated=not job.needs.data_free))
    solve += sum(_reconstruct_seconds(job, way, speed) for way in job.ways)
    weights = sum(layer.linear.in_features * layer.linear.out_features for layer in prepared.plan.layers)
    # to unpack takes as long as to compare; two threads do either
    unpacked = len(prepared.targets) * speed.solve.seconds(Work(compared=weights)) / min(2, at_once)
    pack = unpacked + disk_bytes(prepared) / speed.write + packed / speed.hashed
    check = 2 * unpacked + (len(prepared.targets) * source + packed) / speed.read
    begun = max(preparing, digest)  # at once
    total = begun + calibrate + solve + pack + check
    return PlanSeconds(begun, calibrate, solve, pack, check, total)


def _solve_work(job: Forecast) -> Work:
    plans = job.prepared.plan.by_name
    total = Work()
    for shared in job.prepared.plan.inputs:
        rows = job.rows(shared)
        total += solve_work(shared, plans, job.prepared.settings, rows=rows)
        if (
            job.prepared.recipe.quantization.rank == "auto"
        ):  # the search for ranks is about as long as the paper's
            total += solve_work(shared, plans, replace(job.prepared.settings, steps=()), rows=rows)
    return total


def _calibrate_seconds(job: Forecast, images: Images, speed: Speed) -> float:
    """All images and one step to see what runs; loading and keeping of what is read and kept."""
    plan, wanted, settings, kept = job.prepared.plan, images.sampling, images.sampling.settings, images.kept
    passes = (wanted.samples * settings.steps + 1) * images.tokens.passes.count
    # half of every product: the other half is the same
    products = sum(kept.covariance_tokens[name] * width**2 for name, width in kept.widths.items())
    return (
        passes * pass_seconds(plan, images.tokens, speed)
        + _loading_seconds(job, speed)
        + speed.solve.seconds(Work(matmul=products))
        + (kept.bytes + kept.part_bytes) / speed.write
    )


def _reconstruct_seconds(job: Forecast, blocks: BlockForecast, speed: Speed) -> float:
    """The images are generated, hidden states go through the blocks or the model is tuned, and what is tuned kept."""
    passes = blocks.images * blocks.steps * blocks.tokens.passes.count
    images = passes * pass_seconds(job.prepared.plan, blocks.tokens, speed) + _loading_seconds(job, speed)
    return images + speed.solve.seconds(blocks.work) + blocks.kept / speed.write


def pass_seconds(plan: ModelPlan, tokens: TokenCounts, speed: Speed) -> float:
    """The denoiser, once for one image; of several that have their turns in other steps, the mean."""
    flops, calls = 0.0, 0
    for layer in plan.layers:
        flops += 2 * tokens.by_layer[layer.name] * layer.linear.in_features * layer.linear.out_features
        calls += 15  # of torch: the layer, its hook, and its share of norms, activations and attention
    seconds = flops / speed.forward + calls / speed.solve.calls
    return seconds / len(plan.components) if take_turns(plan.components) else seconds


def _loading_seconds(job: Forecast, speed: Speed) -> float:
    return (job.prepared.source.bytes + sum(other_weights(job.prepared.source).values())) / speed.read


# ------------------------------------------------------------------------------------------------- memory and disk


def ram_bytes(job: Forecast) -> int:
    """Peak of the process: what it holds now, with everything imported, and the largest stage's needs. A conversion
    that `--max-ram` leaves less than that makes do with less."""
    stages = [0, *_solving_bytes(job)]
    on_cpu = job.device.type == "cpu"
    if on_cpu and not job.needs.data_free:
        stages += [calibration_bytes(plan) for plan in job.prepared.encoders]
    if images := job.images:
        batch = images.sampling.settings.batch_size
        stages += _generating_stages(job, images.tokens, batch=batch, cpu=on_cpu)
    for way in job.ways:
        stages += _generating_stages(job, way.tokens, batch=way.batch, cpu=on_cpu)
        stages.append(job.waiting_bytes(way) + (way.device_bytes if on_cpu else 0))
    peak = reserved_ram() + max(stages)
    return peak if job.options.max_ram is None else min(peak, job.options.max_ram)


def _solving_bytes(job: Forecast) -> list[int]:
    """The memory of every layer group and of what waits next to it; or of the largest that are solved side by side, as
    many as there is memory for."""
    layer_groups = _layer_groups(job)
    needs = [_planned(job, layer_group)[1].ram for layer_group in layer_groups]
    at_once = layer_groups_at_once(job.device)
    if not at_once:
        return [need + _waiting_bytes(job, each) for need, each in zip(needs, layer_groups, strict=True)]
    room = (1 - SPARED) * free_ram(job.options)
    largest = sorted(needs, reverse=True)[:at_once]
    plans = job.prepared.plan.by_name
    written = max(packed_bytes(layer_group, plans) for layer_group in layer_groups)
    fitting = [sum(largest[:count]) + written for count in range(1, at_once + 1)]
    return [max((needed for needed in fitting if needed <= room), default=fitting[0])]


def vram_bytes(job: Forecast) -> int | None:
    """Peak of torch's allocator; None without a GPU."""
    if job.device.type != "cuda":
        return None
    stages = [_planned(job, layer_group)[1].vram for layer_group in _layer_groups(job)]
    if not job.needs.data_free:
        stages += [calibration_bytes(plan) for plan in job.prepared.encoders]
    if images := job.images:
        batch = images.sampling.settings.batch_size
        stages += _generating_stages(job, images.tokens, batch=batch, cpu=True)
    for way in job.ways:
        stages += _generating_stages(job, way.tokens, batch=way.batch, cpu=True)
        stages.append(way.device_bytes)
    peak = max(stages)
    return peak if job.options.max_vram is None else min(peak, job.options.max_vram)


def require_memory(job: Forecast) -> None:
    """OutOfResourcesError for a layer group that can't be solved in the available memory, `--max-ram` and `--max-vram`
    kept, and for a model that can't be tuned. (What calibration may take is settled where the model is loaded.)"""
    for layer_group in _layer_groups(job):
        needs = _needs(job, layer_group)
        if not open_placements(placements_on(job.device), needs.__getitem__, job.options):
            raise too_large(layer_group.layers[0], needs.__getitem__, job.device, job.options)
    if job.tuning and not _blocks_fit(job, job.tuning):
        raise _blocks_too_large(job, job.tuning)


def lack_of_ram(job: Forecast) -> str | None:
    """Why a layer can't be solved within `--max-ram`, whatever memory this machine has; None where all can."""
    options = job.options
    if options.max_ram is None:
        return None
    for layer_group in _layer_groups(job):
        needs = _needs(job, layer_group)
        within = [need.ram for need in needs.values() if (options.max_vram or need.vram) >= need.vram]
        taken = reserved_ram() + min(within or [need.ram for need in needs.values()])
        if taken > options.max_ram:
            allowed = f"--max-ram allows {options.max_ram / 1e9:.3f} GB"
            return f"{layer_group.layers[0]}: solving it takes {taken / 1e9:.3f} GB, but {allowed}"
    return None


def affordable_needs(job: Forecast) -> tuple[Needs, tuple[str, ...]]:
    """What the conversion can do in the available memory, `--max-ram` and `--max-vram` kept, and a warning of what it
    leaves out: the fit of the last linear."""
    if job.output is None or _blocks_fit(job, job.output):
        return job.needs, ()
    warning = (
        f"the last linear layer is not fitted: to run the 4-bit model beside the 16-bit one takes "
        f"{job.output.device_bytes / 1e9:.2f} GB, more than is free"
    )
    return replace(job.needs, output=None), (warning,)


def _blocks_fit(job: Forecast, blocks: BlockForecast) -> bool:
    on_cpu = job.device.type == "cpu"
    return blocks.device_bytes <= (free_ram(job.options) if on_cpu else free_vram(job.device, job.options))


def _blocks_too_large(job: Forecast, blocks: BlockForecast) -> OutOfResourcesError:
    needed, cpu = blocks.device_bytes, job.device.type == "cpu"
    option, limit = ("--max-ram", job.options.max_ram) if cpu else ("--max-vram", job.options.max_vram)
    held = reserved_ram() if cpu and limit is not None else 0
    there = (
        f"{option} allows {limit / 1e9:.2f} GB"
        if limit is not None
        else f"too little is free on {job.device}"
    )
    return OutOfResourcesError(
        f"tuning the model takes {(held + needed) / 1e9:.2f} GB, but {there}",
        hint=f"lower batch_size or the image size under calibration, raise {option}, or use --effort balanced",
        where="quantization.effort",
        kind="out-of-memory",
    )


def on_the_cpu(job: Forecast) -> tuple[str, ...]:
    """A warning of layers that `--max-vram` leaves no room for."""
    moved = [
        layer_group
        for layer_group in _layer_groups(job)
        if _planned(job, layer_group)[0].device != job.device
    ]
    if not moved:
        return ()
    count = sum(len(layer_group.layers) for layer_group in moved)
    return (
        f"{count} layers will be solved on the CPU, which takes longer than predicted: --max-vram has no room for "
        f"them (the first is {moved[0].layers[0]})",
    )


def _layer_groups(job: Forecast) -> tuple[SharedInput, ...]:
    return job.prepared.plan.layer_groups(data_free=job.needs.data_free)


def _needs(job: Forecast, layer_group: SharedInput) -> dict[Placement, MemoryNeed]:
    need = partial(
        memory_need,
        layer_group=layer_group,
        plans=job.prepared.plan.by_name,
        settings=job.prepared.settings,
        rows=job.rows(layer_group),
        itemsize=stored_itemsize(job.prepared),
        covariance=bool(job.covariance_tokens.get(layer_group.name)),
    )
    return {placement: need(placement) for placement in placements_on(job.device)}


def _planned(job: Forecast, layer_group: SharedInput) -> tuple[Placement, MemoryNeed]:
    """The fastest way that fits, or the most sparing one where none does; and what it needs."""
    needs = _needs(job, layer_group)
    placements = placements_on(job.device)
    placement = (*open_placements(placements, needs.__getitem__, job.options), placements[-1])[0]
    return placement, needs[placement]


def _waiting_bytes(job: Forecast, layer_group: SharedInput) -> int:
    plans = job.prepared.plan.by_name
    pinned = job.device.type == "cuda"
    return waiting_bytes(layer_group, plans, itemsize=stored_itemsize(job.prepared), pinned=pinned)


def _generating_stages(job: Forecast, tokens: TokenCounts, *, batch: int, cpu: bool) -> list[int]:
    """The text encoders with the rest of the pipeline, then the denoiser with its activations. `cpu`: whether they
    compute where the memory is asked for; `batch`: images generated at a time."""
    itemsize = compute_dtype(job.device).itemsize
    others = sum(other_weights(job.prepared.source).values()) * itemsize // 2  # stored in 16 bits
    if not cpu:
        return [others]
    activations = tokens.forward_bytes(batch=batch, itemsize=itemsize)
    denoiser = job.prepared.plan.parameters * itemsize
    return [others, denoiser + activations]


def peak_disk_bytes(job: Forecast) -> int:
    """Bytes on the disk at its fullest: statistics that were generated, next to the parts of batches while those
    are merged; or without, with the solved layers and the outputs."""
    parts, statistics = _statistics_bytes(job)
    kept, spilled = _solved_bytes(job)
    return max(parts + statistics, statistics + kept + max(spilled, disk_bytes(job.prepared)))


def _statistics_bytes(job: Forecast) -> tuple[int, int]:
    """Bytes of the parts of batches, and of the statistics that they are merged into; 0 where none are generated."""
    return (job.images.kept.part_bytes, job.images.kept.bytes) if job.images else (0, 0)


def _solved_bytes(job: Forecast) -> tuple[int, int]:
    """Bytes of the work folder's solved layers, and of the hidden states that do not fit the memory."""
    kept = work_bytes(job.prepared.plan, job.prepared.settings.dtype) + sum(way.kept for way in job.ways)
    spilled = max((way.passed_bytes - job.waiting_bytes(way) for way in job.ways), default=0)
    return kept, max(0, spilled)


def disk_bytes(prepared: Prepared) -> int:
    """What all outputs take together, the other components of a pipeline's copy included."""
    state = prepared.inventory.state
    folders = [target for target in prepared.targets if not target.format.single_file]
    packed = sum(target.bytes(state) for target in prepared.targets)
    return packed + len(folders) * other_components_bytes(prepared.source, prepared.encoders)


def disk_needs(job: Forecast, paths: Sequence[Path], work: Path) -> dict[Path, int]:
    """Bytes that are still to be written, by where: the outputs, and what is not in the work folder yet."""
    parts, statistics = _statistics_bytes(job)
    if (work / CALIBRATION).exists():
        parts = 0  # merged and gone
    fullest = max(parts + statistics, statistics + sum(_solved_bytes(job)))
    return {paths[0]: disk_bytes(job.prepared), work: max(0, fullest - kept_bytes(work))}


def work_bytes(plan: ModelPlan, dtype: torch.dtype) -> int:
    """What the solved layers of a plan take in the work folder."""
    return sum(solved_bytes(layer, dtype) for layer in plan.layers)
