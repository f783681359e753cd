"""A layer group solved in the available memory: with all its weights there, with one at a time, or on the CPU.

What is predicted not to fit is not tried; where memory runs out all the same, the next way is. On one type of device
both ways give the same bytes. Those of a CPU and of a GPU differ in the lowest bits, so a layer's report says where it
was solved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from svdq_cli.calibration.covariance import covariance_bytes
from svdq_cli.conversion.memory import free_ram, reserved_ram
from svdq_cli.conversion.read_weights import reading_bytes
from svdq_cli.errors import OutOfResourcesError, as_out_of_memory
from svdq_cli.pack.padding import ceil_div
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.records import Event, LayerPlan, Observer, SharedInput, SolveSettings
from svdq_cli.solve.costs import solve_bytes
from svdq_cli.system.allocator import return_freed_memory
from svdq_cli.system.machine import available_ram, resident_ram
from svdq_cli.system.threads import NoMemoryAlongside

Result = TypeVar("Result")
_CURE = "close other programs, or choose a smaller --effort or fewer calibration rows"


@dataclass(frozen=True, slots=True)
class Placement:
    """How a layer group is solved."""

    device: torch.device
    streamed: bool  # each weight is read when it is needed, and let go

    def __str__(self) -> str:
        at_a_time = " with one weight at a time" if self.streamed else ""
        return f"on the {'CPU' if self.device.type == 'cpu' else 'GPU'}{at_a_time}"


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a placement takes in addition to what the process already holds."""

    ram: int
    vram: int


def placements_on(device: torch.device) -> tuple[Placement, ...]:
    """All possible placements, from the fastest to the one that takes the least memory of `device`."""
    devices = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    return tuple(Placement(each, streamed) for each in devices for streamed in (False, True))


def memory_need(
    placement: Placement,
    layer_group: SharedInput,
    plans: Mapping[str, LayerPlan],
    settings: SolveSettings,
    *,
    rows: int,
    itemsize: int,
    covariance: bool = False,
) -> MemoryNeed:
    """`rows`: calibration rows; `covariance`: whether there is that of more tokens; `itemsize`: bytes of a stored
    weight. What was read ahead is held already."""
    sizes = [plans[name].linear.out_features * plans[name].linear.in_features for name in layer_group.layers]
    width = plans[layer_group.layers[0]].linear.in_features
    ram = 2 * rows * width + (itemsize * max(sizes) if placement.streamed else 0)  # the rows as they are kept
    ram += covariance_bytes(width) if covariance else 0
    working = solve_bytes(layer_group, plans, settings, rows=rows, streamed=placement.streamed)
    if placement.device.type == "cpu":
        numbers = max(sizes) if placement.streamed else sum(sizes)
        return MemoryNeed(ram + max(working, 4 * numbers + reading_bytes(max(sizes))), 0)
    # with the codes of the layer group before, which are packed there
    return MemoryNeed(ram, working + 3 * sum(sizes))


def stored_itemsize(prepared: Prepared) -> int:
    """Bytes of a stored weight, rounded up: sources are of one dtype but for a few small tensors."""
    return ceil_div(prepared.source.bytes, max(1, prepared.plan.parameters))


def open_placements(
    placements: tuple[Placement, ...],
    need: Callable[[Placement], MemoryNeed],
    options: RunOptions,
    *,
    reserved: int | None = None,
) -> tuple[Placement, ...]:
    """The ways for which there is memory now; `reserved` as `free_ram` takes it."""
    ram = free_ram(options, reserved=reserved)
    return tuple(
        placement
        for placement in placements
        if need(placement).ram <= ram and _within(options.max_vram, need(placement).vram)
    )


def _within(limit: int | None, needed: int) -> bool:
    return limit is None or needed <= limit


def where_it_fits(
    layer: str,
    attempt: Callable[[Placement], Result],
    need: Callable[[Placement], MemoryNeed],
    *,
    device: torch.device,
    options: RunOptions,
    observe: Observer,
    let_go: Callable[[], object] = lambda: None,
    stage: str = "solve",
    reserved: int | None = None,
    alone: bool = True,
) -> Result:
    """What `attempt` makes of the layer group named after `layer`, with the first placement that fits in memory.

    `let_go` frees whatever the layer group can do without; `stage` names the events; `reserved` as `free_ram` takes it.
    Raises OutOfResourcesError when not one way has the memory; NoMemoryAlongside when the first has none and others are
    solved meanwhile, so that it is not `alone`.
    """
    every = placements_on(device)
    placements = open_placements(every, need, options, reserved=reserved)
    if not alone:
        return _attempt_beside(attempt, placements[:1] == every[:1], every[0])
    if placements[:1] != every[:1]:
        let_go()
        placements = open_placements(every, need, options, reserved=reserved)
    if not placements:
        raise too_large(layer, need, device, options, reserved=reserved)
    if placements[0].device != device:
        lack = too_large(layer, need, device, options, reserved=reserved)
        observe(Event("warning", stage, detail=f"{lack}; now {placements[0]}"))
    return _first_that_ends(layer, attempt, placements, let_go, stage, observe)


def _attempt_beside(attempt: Callable[[Placement], Result], fits: bool, placement: Placement) -> Result:
    if fits:
        try:
            return attempt(placement)
        except (RuntimeError, MemoryError) as error:
            if as_out_of_memory(error) is None:
                raise
    # Only here are the attempt's tensors gone: the exception held its frames.
    raise NoMemoryAlongside


def _first_that_ends(
    layer: str,
    attempt: Callable[[Placement], Result],
    placements: tuple[Placement, ...],
    let_go: Callable[[], object],
    stage: str,
    observe: Observer,
) -> Result:
    placement, others = placements[0], placements[1:]
    try:
        return attempt(placement)
    except (RuntimeError, MemoryError) as error:
        lack = as_out_of_memory(error)
        if lack is None:
            raise
    # Only here are the attempt's tensors gone: the exception held its frames.
    let_go()
    return_device_memory()
    failure = f"{layer}: solving it {placement}: {lack.message}"
    if not others:
        raise OutOfResourcesError(failure, hint=_CURE, where=layer, kind="out-of-memory")
    observe(Event("warning", stage, detail=f"{failure}; now {others[0]}"))
    return _first_that_ends(layer, attempt, others, let_go, stage, observe)


def return_device_memory() -> None:
    """What allocators keep of tensors that are gone, on the host and on the GPU."""
    return_freed_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def too_large(
    layer: str,
    need: Callable[[Placement], MemoryNeed],
    device: torch.device,
    options: RunOptions,
    *,
    reserved: int | None = None,
) -> OutOfResourcesError:
    """Why no way on `device` fits, with what the most sparing one takes."""
    on_device = [need(placement) for placement in placements_on(device) if placement.device == device]
    ram, vram = min(each.ram for each in on_device), min(each.vram for each in on_device)
    with_held = ram + max(resident_ram(), reserved_ram() if reserved is None else reserved)
    if options.max_vram is not None and vram > options.max_vram:
        needed, option, limit = vram, "--max-vram", options.max_vram
    elif options.max_ram is not None and with_held > options.max_ram:
        needed, option, limit = with_held, "--max-ram", options.max_ram
    else:
        return OutOfResourcesError(
            f"{layer}: solving it takes {ram / 1e9:.2f} GB of memory, but {available_ram() / 1e9:.2f} GB are free",
            hint=_CURE,
            where=layer,
            kind="out-of-memory",
        )
    return OutOfResourcesError(
        f"{layer}: solving it takes {needed / 1e9:.3f} GB, but {option} allows {limit / 1e9:.3f} GB",
        hint=f"raise {option}, or choose a smaller --effort or fewer calibration rows",
        where=layer,
        kind="out-of-memory",
    )
