"""A denoiser in the memory that there is: whole on the device where it fits, else its blocks brought there to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from svdq_cli.errors import OutOfResourcesError
from svdq_cli.inference.backend import compute_dtype
from svdq_cli.inference.load import fill_denoiser
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, counts_of
from svdq_cli.records import Event, Observer
from svdq_cli.storage.library_facts import spared_cost
from svdq_cli.system.machine import available_ram, available_vram, resident_ram
from svdq_cli.system.offload import WeightBudget

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNCOUNTED = 48 * 2**20  # bytes of host memory that no prediction knows of: blocks of files, Python's objects
SHARES = (1.0, 0.5, 0.0)  # of the room for weights, one after the other where memory runs out after all

T = TypeVar("T")


def run_as_it_fits(
    pipe: DiffusionPipeline,
    prepared: Prepared,
    settings: SamplingSettings,
    work: Callable[[], T],
    *,
    device: torch.device,
    options: RunOptions,
    stage: str,
    observe: Observer,
) -> T:
    """The result of `work`, which generates with `pipe` (of `load_without_denoiser`) once that has its denoiser.

    Where memory runs out, work is started again with fewer blocks on the GPU. Raises OutOfResourcesError when not one
    fits there.
    """
    room = _room(prepared, settings, device, options)

    def attempt(share: float) -> T:
        within = WeightBudget(int(room.device * share), room.host)
        fill_denoiser(pipe, prepared.source, class_name=prepared.plan.model_class, device=device, room=within)
        return work()

    return first_that_fits(
        attempt, SHARES if device.type == "cuda" else SHARES[:1], stage=stage, observe=observe
    )


def first_that_fits(
    attempt: Callable[[float], T], shares: Sequence[float], *, stage: str, observe: Observer
) -> T:
    """What `attempt` makes of the first of `shares` that it has the memory for. Raises OutOfResourcesError where it has
    none for the last."""
    share, *smaller = shares
    try:
        return attempt(share)
    except OutOfResourcesError as error:
        if not smaller:
            raise
        lack = error.message
    # Only here are the attempt's tensors gone: the exception held its frames.
    torch.cuda.empty_cache()
    observe(Event("warning", stage, detail=f"{lack}; fewer blocks stay on the GPU"))
    return first_that_fits(attempt, smaller, stage=stage, observe=observe)


def free_ram(options: RunOptions, *, reserved: int | None = None) -> int:
    """Bytes of host memory that this process may still take, `--max-ram` kept.

    `reserved` (of `reserved_ram`, when the work began): what the process holds without the work's tensors once it has
    all that no prediction knows of; without it, that is still to come.
    """
    ram = available_ram()
    if options.max_ram is None:
        return ram
    return min(ram, options.max_ram - max(resident_ram(), reserved_ram() if reserved is None else reserved))


def reserved_ram() -> int:
    """Bytes of host memory that this process holds, or would without a cache of what diffusers says, and those that no
    prediction knows of."""
    return resident_ram() + spared_cost().bytes + UNCOUNTED


def free_vram(device: torch.device, options: RunOptions) -> int:
    """Bytes of GPU memory that the process may still take, within `--max-vram`."""
    vram = available_vram(device)
    return (
        vram
        if options.max_vram is None
        else min(vram, options.max_vram - torch.cuda.memory_allocated(device))
    )


def _room(
    prepared: Prepared, settings: SamplingSettings, device: torch.device, options: RunOptions
) -> WeightBudget:
    """What the denoiser's weights may take once the rest has its share."""
    itemsize = compute_dtype(device).itemsize
    working = counts_of(prepared, settings).forward_bytes(batch=settings.batch_size, itemsize=itemsize)
    ram = free_ram(options)
    if device.type != "cuda":
        return WeightBudget(max(0, ram - working), 0)
    return WeightBudget(max(0, free_vram(device, options) - working), max(0, ram))
