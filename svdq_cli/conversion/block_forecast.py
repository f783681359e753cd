"""What going through the blocks will take: of time, of the device's memory, of host memory and of the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from svdq_cli.conversion.memory import free_ram, free_vram
from svdq_cli.conversion.record import Sample, sample_settings
from svdq_cli.conversion.work_folder import solved_bytes
from svdq_cli.inference.backend import compute_dtype
from svdq_cli.pack.padding import ceil_div
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, counts_of
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.reconstruct import blocks_of
from svdq_cli.reconstruct.costs import (
    BlockSize,
    CallCounts,
    passing_bytes,
    passing_work,
    tuning_bytes,
    tuning_work,
)
from svdq_cli.records import W4A4Plan
from svdq_cli.sampling.token_counts import TokenCounts, reads_text
from svdq_cli.solve.work import Work
from svdq_cli.source import by_component


@dataclass(frozen=True, slots=True)
class BlockForecast:
    """A model's blocks, and the calls that are recorded of it."""

    sizes: dict[str, BlockSize]
    tokens: TokenCounts
    calls: CallCounts
    images: int  # that are generated to record them
    steps: int  # of each
    batch: int  # images of one call
    itemsize: int  # bytes of a 16-bit model's number where it computes
    beside: int  # weights outside the blocks
    kept: int  # bytes of the tuned layers in the work folder
    tuned: bool  # as a whole, or only gone through, to fit what comes behind them

    @property
    def work(self) -> Work:
        """Of tuning all blocks, or of going through them, without that of generating the images."""
        total, of_one = Work(), tuning_work if self.tuned else passing_work
        for size in self.sizes.values():
            total += of_one(size, self.calls)
        return total

    @property
    def device_bytes(self) -> int:
        """Peak bytes on the device."""
        beside, sizes = self.itemsize * self.beside, self.sizes.values()
        if self.tuned:
            return beside + tuning_bytes(sizes, self.calls, itemsize=self.itemsize)
        return beside + max((passing_bytes(size, self.itemsize) for size in sizes), default=0)

    @property
    def passed_bytes(self) -> int:
        """Hidden states that wait in host memory or on the disk; none where the model is tuned."""
        if self.tuned:
            return 0
        passed = (size.passed_bytes(self.itemsize) for size in self.sizes.values())
        return self.calls.all * max(passed, default=0)


def block_forecast(
    prepared: Prepared, sampling: Sampling, sample: Sample, device: torch.device, *, tuned: bool = True
) -> BlockForecast:
    """The forecast of tuning the model, or of only going through its blocks, from the plan alone. `sampling`: of the
    images."""
    settings = sample_settings(sampling, sample)
    images = min(sample.images, sample.batches * settings.batch_size, sample.times * sampling.samples)
    batches = ceil_div(images, settings.batch_size)
    batch = min(settings.batch_size, images)
    counts = counts_of(prepared, settings)
    entries = batch * counts.passes.entries
    sizes = {block: _size(prepared, counts, block, entries) for block in blocks_of(prepared.plan)}
    return BlockForecast(
        sizes=sizes,
        tokens=counts,
        calls=CallCounts(batches * counts.passes.calls, min(sample.calls, settings.steps)),
        images=images,
        steps=settings.steps,
        batch=batch,
        itemsize=compute_dtype(device).itemsize,
        beside=max(_beside(prepared, sizes).values()),  # denoisers are tuned one after the other
        kept=tuned_bytes(prepared) if tuned else 0,
        tuned=tuned,
    )


def _beside(prepared: Prepared, sizes: Mapping[str, BlockSize]) -> dict[str, int]:
    """The bytes of each component's weights outside its blocks."""
    components = prepared.source.components
    state = by_component(components, prepared.inventory.state)
    inside = by_component(components, sizes)
    return {
        component: sum(map(prod, state[component].values()))
        - sum(size.kept + size.weights for size in inside[component].values())
        for component in components
    }


def hidden_state_bytes(forecast: BlockForecast, options: RunOptions, device: torch.device) -> int:
    """Bytes of host memory for hidden states: half of what the block whose turn it is leaves free."""
    taken = forecast.device_bytes if device.type == "cpu" else 0
    return max(0, free_ram(options) - taken) // 2


def room_for_blocks(forecast: BlockForecast, options: RunOptions, device: torch.device) -> int:
    """Bytes on the device for weights of blocks whose turn it is not: half of what tuning leaves free."""
    if not forecast.tuned:
        return 0
    free = free_ram(options) if device.type == "cpu" else free_vram(device, options)
    return max(0, free - forecast.device_bytes) // 2


def tuned_bytes(prepared: Prepared) -> int:
    """Bytes of the tuned blocks in the work folder, in addition to the solved layers."""
    heads = tuple(f"{block}." for block in blocks_of(prepared.plan))
    dtype = prepared.settings.dtype
    return sum(solved_bytes(plan, dtype) for plan in prepared.plan.w4a4 if plan.name.startswith(heads))


def _size(prepared: Prepared, counts: TokenCounts, block: str, batch: int) -> BlockSize:
    head = f"{block}."
    layers = tuple(
        (plan, batch * counts.by_layer[plan.name])
        for plan in prepared.plan.layers
        if plan.name.startswith(head)
    )
    numbers = sum(prod(shape) for name, shape in prepared.inventory.state.items() if name.startswith(head))
    weights = sum(plan.linear.in_features * plan.linear.out_features for plan, _ in layers)
    streams = {reads_text(plan.name): count for plan, count in layers if isinstance(plan, W4A4Plan)}
    # a block may hold none but what makes modulation (Kandinsky 3)
    width = next((plan.linear.in_features for plan, _ in layers if isinstance(plan, W4A4Plan)), 0)
    return BlockSize(layers, numbers - weights, sum(streams.values()), width, batch)
