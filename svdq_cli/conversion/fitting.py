"""A denoiser in the memory that there is: whole on the device where it fits, else its blocks brought there to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from svdq_cli.calibrate.settings import DrawSettings
from svdq_cli.errors import OutOfResourcesError
from svdq_cli.loading import compute_dtype, fill_denoiser
from svdq_cli.machine import available_ram, available_vram, resident_ram
from svdq_cli.offload import Room
from svdq_cli.preparing import Prepared, RunOptions
from svdq_cli.records import Event, Observer
from svdq_cli.tokens import forward_bytes, image_tokens, text_tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SHARES = (1.0, 0.5, 0.0)  # of the room for weights, one after the other where memory runs out after all

T = TypeVar("T")


def run_as_it_fits(
    pipe: DiffusionPipeline,
    prepared: Prepared,
    settings: DrawSettings,
    work: Callable[[], T],
    *,
    device: torch.device,
    options: RunOptions,
    stage: str,
    observe: Observer,
) -> T:
    """What `work` returns, which draws with `pipe` (of `load_without_denoiser`) once that has its denoiser.

    Where memory runs out, work is begun again with fewer blocks on the GPU. Raises OutOfResourcesError when not one
    fits there.
    """
    room = _room(prepared, settings, device, options)
    for share in SHARES:
        try:
            within = Room(int(room.device * share), room.host)
            class_name = prepared.plan.model_class
            fill_denoiser(pipe, prepared.source, class_name=class_name, device=device, room=within)
            return work()
        except OutOfResourcesError as error:
            if share == SHARES[-1] or device.type != "cuda":
                raise
            torch.cuda.empty_cache()
            observe(Event("warning", stage, detail=f"{error.message}; fewer blocks stay on the GPU"))
    raise AssertionError("the last share returns or raises")


def free_ram(options: RunOptions) -> int:
    """Bytes of host memory that this process may still take, `--max-ram` kept."""
    ram = available_ram()
    return ram if options.max_ram is None else min(ram, options.max_ram - resident_ram())


def free_vram(device: torch.device, options: RunOptions) -> int:
    """The same of a GPU's memory and `--max-vram`."""
    vram = available_vram(device)
    return (
        vram
        if options.max_vram is None
        else min(vram, options.max_vram - torch.cuda.memory_allocated(device))
    )


def _room(prepared: Prepared, settings: DrawSettings, device: torch.device, options: RunOptions) -> Room:
    """What the denoiser's weights may take once the rest has its share."""
    source = prepared.source
    picture = image_tokens(source, height=settings.height, width=settings.width) * (settings.frames or 1)
    tokens = settings.batch_size * (picture + text_tokens(source, settings.max_sequence_length))
    working = forward_bytes(
        prepared.inventory.linears, tokens=tokens, itemsize=compute_dtype(device).itemsize
    )
    ram = free_ram(options)
    if device.type != "cuda":
        return Room(max(0, ram - working), 0)
    return Room(max(0, free_vram(device, options) - working), max(0, ram))
