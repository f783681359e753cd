"""All layers of a model, solved one layer group at a time; each is kept in the work folder as soon as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import torch
from torch import Tensor

from svdq_cli.calibration.artefact import Calibration
from svdq_cli.conversion.memory import free_ram, reserved_ram
from svdq_cli.conversion.memory_backoff import (
    MemoryNeed,
    Placement,
    memory_need,
    placements_on,
    stored_itemsize,
    where_it_fits,
)
from svdq_cli.conversion.read_weights import RawWeight, StreamedWeights, read_ahead
from svdq_cli.conversion.resume import wait_for_files
from svdq_cli.conversion.work_folder import (
    LAYERS,
    SolvedLayers,
    WorkFolder,
    quoted,
    report_json,
    report_of_json,
)
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.records import (
    ActivationStats,
    Event,
    LayerPlan,
    LayerReport,
    ModelPlan,
    Observer,
    SharedInput,
    ignore_events,
)
from svdq_cli.solve.costs import NOMINAL, packed_bytes, solve_work, stored_bytes
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.solve.means import less_mean
from svdq_cli.system.allocator import free_large_tensors_at_once, free_tensors_at_once, return_freed_memory
from svdq_cli.system.machine import on_device
from svdq_cli.system.threads import background_writer, cores, map_concurrently, prefetch

LEFT = "left"  # topic: the layer groups that are still to be solved
MOST_AT_ONCE = 8  # layer groups; more would wait for the memory's speed, and take gigabytes of it
CPU = torch.device("cpu")
# Of the memory that is free at first, this much is left alone when others are started next to a layer group: for codes
# that wait to be written, and for what predictions are off. A layer group alone may take all of it.
SPARED = 0.2


@dataclass(frozen=True, slots=True)
class Statistics:
    """Calibration statistics, generated just now or opened from an artefact."""

    digest: str
    of: Mapping[str, ActivationStats] | Calibration
    # by input: what it is less than it was
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __call__(self, name: str) -> ActivationStats:
        seen = self.of.stats(name) if isinstance(self.of, Calibration) else self.of[name]
        return less_mean(seen, self.means[name]) if name in self.means else seen

    def rows(self, name: str) -> int:
        """How many rows an input has."""
        if isinstance(self.of, Calibration):
            return next((entry.rows for entry in self.of.manifest.inputs if entry.name == name), 0)
        return self.of[name].rows.shape[0]

    def has_covariance(self, name: str) -> bool:
        """Whether there is the covariance of more tokens than an input has rows."""
        if isinstance(self.of, Calibration):
            return any(entry.name == name and entry.covariance_tokens for entry in self.of.manifest.inputs)
        return self.of[name].covariance is not None


def solve_into(
    work: WorkFolder,
    prepared: Prepared,
    statistics: Statistics | None,
    device: torch.device,
    observe: Observer,
    *,
    options: RunOptions = DEFAULT_OPTIONS,
    reserved: int | None = None,
) -> int:
    """Every layer that the work folder does not hold yet. Returns how many it held. Other processes take their part of
    the layers in `solve_share`. `reserved`: `reserved_ram` when the run was accepted. Raises OutOfResourcesError for a
    layer that fits in no memory."""
    data_free = statistics is None
    layer_groups = prepared.plan.layer_groups(data_free=data_free)
    left = [layer_group for layer_group in layer_groups if not _is_finished(work, layer_group, observe)]
    held = len(prepared.plan.layers) - sum(len(layer_group.layers) for layer_group in left)
    team, job = options.team, Solving(prepared, statistics, device, options, observe, reserved)
    if team.size > 1 or layer_groups_at_once(device):
        left = job.longest_first(left)
    if team.size > 1:
        team.broadcast(LEFT, {"layer groups": [_key(layer_group) for layer_group in left]})
    # Closed where it is left, or its threads would begin what follows until the garbage is collected.
    with (
        background_writer() as keep,
        closing(_solved(job, team.claims(LEFT, left), wait=keep.wait)) as solved,
    ):
        for layer_group, each in _observed(prepared, solved, held, observe):
            keep(partial(_keep, work, layer_group, each))
            del each  # or its codes would stay until the next layer group is solved
    team.gather(LEFT)
    wait_for_files(work.path, lambda: [_key(each) for each in left if not work.has(LAYERS, _key(each))])
    return held


def solve_share(
    work: WorkFolder,
    prepared: Prepared,
    statistics: Statistics | None,
    device: torch.device,
    *,
    options: RunOptions,
) -> None:
    """What a process other than the first does of `solve_into`."""
    layer_groups = {_key(each): each for each in prepared.plan.layer_groups(data_free=statistics is None)}
    team = options.team
    left = [layer_groups[key] for key in cast("list[str]", team.receive(LEFT)["layer groups"])]
    job = Solving(prepared, statistics, device, options, ignore_events)
    with (
        background_writer() as keep,
        closing(_solved(job, team.claims(LEFT, left), wait=keep.wait)) as solved,
    ):
        for layer_group, each in solved:
            keep(partial(_keep, work, layer_group, each))
            del each
    team.done(LEFT)


def solved_elsewhere(reports: Sequence[LayerReport], device: torch.device) -> tuple[str, ...]:
    """What to warn of where layers were not solved on `device`."""
    names = [report.name for report in reports if report.search.device != device.type]
    if not names:
        return ()
    return (
        f"GPU memory was too small for {len(names)} of {len(reports)} layers, which were solved on the CPU: "
        f"{', '.join(names)}. Their lowest bits are those that the CPU computes",
    )


def _key(layer_group: SharedInput) -> str:
    """The name of a layer group in the work folder."""
    return layer_group.layers[0]


def _keep(work: WorkFolder, layer_group: SharedInput, solved: SolvedInput) -> None:
    """Codes are packed two a byte where they were solved, so that half as many bytes leave a GPU."""
    solutions, about = solved.solutions, {"reports": [report_json(report) for report in solved.reports]}
    try:
        work.keep(LAYERS, _key(layer_group), solutions, about)
    except torch.OutOfMemoryError:  # the next layer group has taken what a GPU had left
        work.keep(LAYERS, _key(layer_group), [on_device(each, CPU) for each in solutions], about)


def load_solved(
    plan: ModelPlan, work: WorkFolder, *, data_free: bool
) -> tuple[SolvedLayers, list[LayerReport]]:
    """Everything that `solve_into` left in the work folder, the reports in the plan's order of layer groups."""
    layer_groups = plan.layer_groups(data_free=data_free)
    places = {name: (LAYERS, _key(each), plan.by_name[name]) for each in layer_groups for name in each.layers}
    reports = [report for each in layer_groups for report in _kept_reports(work, each)]
    return SolvedLayers(work, places), reports


@dataclass(frozen=True)
class Solving:
    """The statistics, device and options that every layer group is solved with."""

    prepared: Prepared
    statistics: Statistics | None
    device: torch.device
    options: RunOptions
    observe: Observer
    reserved: int | None = None  # as `free_ram` takes it

    @property
    def plans(self) -> Mapping[str, LayerPlan]:
        return self.prepared.plan.by_name

    @cached_property
    def itemsize(self) -> int:
        return stored_itemsize(self.prepared)

    def rows(self, layer_group: SharedInput) -> int:
        """Calibration rows, 0 for data-free."""
        return self.statistics.rows(layer_group.name) if self.statistics else 0

    def need(self, layer_group: SharedInput, placement: Placement) -> MemoryNeed:
        rows, settings = self.rows(layer_group), self.prepared.settings
        return memory_need(
            placement,
            layer_group,
            self.plans,
            settings,
            rows=rows,
            itemsize=self.itemsize,
            covariance=self.statistics is not None and self.statistics.has_covariance(layer_group.name),
        )

    def stored(self, layer_group: SharedInput) -> int:
        """Bytes of its weights as they are read ahead."""
        return stored_bytes(
            layer_group, self.plans, itemsize=self.itemsize, pinned=self.device.type == "cuda"
        )

    def read(self, layer_group: SharedInput) -> dict[str, RawWeight]:
        return read_ahead(self.prepared.source, self.plans, self.device, layer_group)

    def longest_first(self, layer_groups: Iterable[SharedInput]) -> list[SharedInput]:
        def cost(layer_group: SharedInput) -> float:
            work = solve_work(layer_group, self.plans, self.prepared.settings, rows=self.rows(layer_group))
            return NOMINAL.seconds(work)

        return sorted(layer_groups, key=cost, reverse=True)


def _solved(
    job: Solving, layer_groups: Iterable[SharedInput], *, wait: Callable[[], object] = lambda: None
) -> Generator[tuple[SharedInput, SolvedInput], None, None]:
    """Every layer group, as it comes from the device that it was solved on: one after the other while the next one's
    weights are read, or some side by side (`layer_groups_at_once`) as they are done, where there is memory for that.
    `wait` returns when the caller holds no memory for earlier ones."""
    options = job.options
    if options.max_ram is not None:
        free_tensors_at_once()
    return_freed_memory()
    reserved = reserved_ram() if job.reserved is None else job.reserved
    at_first = (1 - SPARED) * free_ram(options, reserved=reserved)

    def solving(layer_groups: Sequence[SharedInput]) -> int:
        return sum(job.need(each, placements_on(job.device)[0]).ram for each in layer_groups)

    def read_beside(busy: Sequence[SharedInput], following: SharedInput) -> bool:
        return solving(busy) + sum(map(job.stored, [*busy, following])) <= at_first

    def solved_beside(busy: Sequence[SharedInput], following: SharedInput) -> bool:
        written = max(packed_bytes(each, job.plans) for each in busy)
        return solving([*busy, following]) + written <= at_first

    def solve(layer_group: SharedInput, raw: dict[str, RawWeight], alone: bool = True) -> SolvedInput:
        def let_go() -> None:
            raw.clear()
            wait()
            return_freed_memory()

        if alone and options.max_ram is not None:
            wait()  # what is being written leaves no room that is sure to be there
        return where_it_fits(
            _key(layer_group),
            lambda placement: _solved_so(placement, job, layer_group, raw),
            partial(job.need, layer_group),
            device=job.device,
            options=options,
            observe=job.observe,
            let_go=let_go,
            reserved=reserved,
            alone=alone,
        )

    if at_once := layer_groups_at_once(job.device):
        if options.max_ram is None:
            free_large_tensors_at_once()
        yield from map_concurrently(
            layer_groups, lambda each, alone: solve(each, {}, alone), threads=at_once, beside=solved_beside
        )
        return_freed_memory()
    else:
        for layer_group, raw in prefetch(layer_groups, job.read, beside=read_beside):
            yield layer_group, solve(layer_group, raw)
            return_freed_memory()


def layer_groups_at_once(device: torch.device) -> int:
    """How many layer groups are solved side by side, memory allowing, each by a thread with one core; 0 for one after
    the other by the main thread with all cores.

    A CPU does so: most of the work is small operations and products with few columns, which more cores do not make
    faster (and next to other work slower, for they wait for one another), and with one core each the sums come out the
    same on every machine.
    """
    return cores(MOST_AT_ONCE) if device.type == "cpu" else 0


def _solved_so(
    placement: Placement, job: Solving, layer_group: SharedInput, raw: dict[str, RawWeight]
) -> SolvedInput:
    """`raw`: weights that were read ahead. Each is let go when it is in float32 on the device."""
    streamed = StreamedWeights(job.prepared.source, job.plans, layer_group.layers, placement.device)
    if placement.streamed:
        weights = streamed
    else:
        weights = {
            name: raw.pop(name).on(placement.device) if name in raw else streamed[name]
            for name in layer_group.layers
        }
    stats = job.statistics(layer_group.name) if job.statistics else None
    return solve_input(layer_group, job.plans, weights, stats, job.prepared.settings)


def _observed(
    prepared: Prepared, solved: Iterable[tuple[SharedInput, SolvedInput]], held: int, observe: Observer
) -> Iterator[tuple[SharedInput, SolvedInput]]:
    """Yield the solutions, and report progress once the caller is done with each. `held` layers were solved by an
    earlier run."""
    done, total = held, len(prepared.plan.layers)
    observe(Event("start", "solve", done, total))
    if held:
        observe(Event("advance", "solve", done, total, f"{held} layers resumed from an earlier run"))
    started = time.monotonic()
    for layer_group, each in solved:
        detail = f"{_key(layer_group)}  {each.reports[0].sqnr_db:.1f} dB"
        yield layer_group, each
        del each  # before the next one is waited for
        done += len(layer_group.layers)
        observe(Event("advance", "solve", done, total, detail, time.monotonic() - started))
    observe(Event("end", "solve", total, total, seconds=time.monotonic() - started))


def _is_finished(work: WorkFolder, layer_group: SharedInput, observe: Observer) -> bool:
    """The stored reports of a layer group; None, with a warning, where the file is damaged."""
    if quoted(_key(layer_group)) not in work.taken_over:
        return False
    try:
        return {report.name for report in _kept_reports(work, layer_group)} == set(layer_group.layers)
    except (InputError, KeyError, TypeError, ValueError) as error:
        observe(Event("warning", "solve", detail=f"{_key(layer_group)} is solved again: {error}"))
        return False


def _kept_reports(work: WorkFolder, layer_group: SharedInput) -> list[LayerReport]:
    said = cast("list[dict[str, object]]", work.about(LAYERS, _key(layer_group))["reports"])
    return [report_of_json(each) for each in said]
