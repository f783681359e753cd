"""All layers of a model, solved one portion after the other; each is kept in the work folder as soon as it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from svdq_cli.allocator import free_tensors_at_once, return_freed_memory
from svdq_cli.calibrate.artefact import Calibration
from svdq_cli.conversion.backoff import Need, Way, need_of, stored_itemsize, ways_on, where_it_fits
from svdq_cli.conversion.fitting import free_ram
from svdq_cli.conversion.working import wait_for_files
from svdq_cli.errors import InputError, as_out_of_memory
from svdq_cli.journal import LAYERS, SolvedLayers, WorkFolder, quoted, report_json, report_of_json
from svdq_cli.machine import on_device, resident_ram
from svdq_cli.overlap import cores, done_behind, made_ahead
from svdq_cli.preparing import DEFAULT_OPTIONS, Prepared, RunOptions
from svdq_cli.records import (
    ActivationStats,
    Event,
    LayerPlan,
    LayerReport,
    LayerSolution,
    ModelPlan,
    Observer,
    SharedInput,
    ignore_events,
)
from svdq_cli.solve.costs import NOMINAL, solve_work, stored_bytes
from svdq_cli.solve.forward import SourceWeight
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.source import Source, TensorEntry, is_finite, read_tensor

LEFT = "left"  # topic: the portions that are still to be solved
MOST_AT_ONCE = 8  # portions; more would wait for the memory's speed, and take gigabytes of it
CPU = torch.device("cpu")
# Of the memory that is free at first, so much is left alone when others are begun beside a portion: for codes that wait
# to be written, and for what predictions are off. A portion alone may take all of it.
SPARED = 0.2


@dataclass(frozen=True, slots=True)
class Statistics:
    """Calibration statistics, drawn just now or opened from an artefact."""

    digest: str
    of: Mapping[str, ActivationStats] | Calibration

    def __call__(self, name: str) -> ActivationStats:
        return self.of.stats(name) if isinstance(self.of, Calibration) else self.of[name]

    def rows(self, name: str) -> int:
        """How many rows an input has."""
        if isinstance(self.of, Calibration):
            return next((entry.rows for entry in self.of.manifest.inputs if entry.name == name), 0)
        return self.of[name].rows.shape[0]


def solve_model(
    prepared: Prepared, statistics: Statistics | None, device: torch.device, observe: Observer
) -> tuple[dict[str, LayerSolution], list[LayerReport]]:
    """Every layer, in the plan's order of portions. Solutions come back on the CPU, all of them in memory."""
    solutions: dict[str, LayerSolution] = {}
    reports: list[LayerReport] = []
    job = Solving(prepared, statistics, device, DEFAULT_OPTIONS, observe)
    for _, solved in _observed(prepared, _solved(job, prepared.plan.portions), 0, observe):
        solutions |= {each.plan.name: on_device(each, CPU) for each in _solutions(solved)}
        reports += solved.reports
    return solutions, reports


def solve_into(
    work: WorkFolder,
    prepared: Prepared,
    statistics: Statistics | None,
    device: torch.device,
    observe: Observer,
    *,
    options: RunOptions = DEFAULT_OPTIONS,
) -> int:
    """Every layer that the work folder does not hold yet. Returns how many it held. Other processes take their part of
    the layers in `solve_share`. Raises OutOfResourcesError for a layer that fits in no memory."""
    left = [portion for portion in prepared.plan.portions if not _is_finished(work, portion, observe)]
    held = len(prepared.plan.layers) - sum(len(portion.layers) for portion in left)
    team = options.team
    if team.size > 1:
        left = _longest_first(left, prepared, statistics)
        team.tell(LEFT, {"portions": [_key(portion) for portion in left]})
    job = Solving(prepared, statistics, device, options, observe)
    with done_behind() as keep:
        solved = _solved(job, team.claims(LEFT, left), wait=keep.wait)
        for portion, each in _observed(prepared, solved, held, observe):
            keep(partial(_keep, work, portion, each))
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
    portions = {_key(portion): portion for portion in prepared.plan.portions}
    team = options.team
    left = [portions[key] for key in cast("list[str]", team.hear(LEFT)["portions"])]
    job = Solving(prepared, statistics, device, options, ignore_events)
    with done_behind() as keep:
        for portion, solved in _solved(job, team.claims(LEFT, left), wait=keep.wait):
            keep(partial(_keep, work, portion, solved))
    team.done(LEFT)


def solved_elsewhere(reports: Sequence[LayerReport], device: torch.device) -> tuple[str, ...]:
    """What to warn of where layers were not solved on `device`."""
    names = [report.name for report in reports if report.device != device.type]
    if not names:
        return ()
    return (
        f"GPU memory was too small for {len(names)} of {len(reports)} layers, which were solved on the CPU: "
        f"{', '.join(names)}. Their lowest bits are the CPU's",
    )


def _key(portion: SharedInput) -> str:
    """Its name in the work folder."""
    return portion.layers[0]


def _keep(work: WorkFolder, portion: SharedInput, solved: SolvedInput) -> None:
    """Codes are packed two a byte where they were solved, so that half as many bytes leave a GPU."""
    solutions, about = _solutions(solved), {"reports": [report_json(report) for report in solved.reports]}
    try:
        work.keep(LAYERS, _key(portion), solutions, about)
    except torch.OutOfMemoryError:  # the next portion has taken what a GPU had left
        work.keep(LAYERS, _key(portion), [on_device(each, CPU) for each in solutions], about)


def _solutions(solved: SolvedInput) -> tuple[LayerSolution, ...]:
    return (*solved.w4a4, *solved.w4a16)


def _longest_first(
    portions: Sequence[SharedInput], prepared: Prepared, statistics: Statistics | None
) -> list[SharedInput]:
    plans = {layer.name: layer for layer in prepared.plan.layers}

    def cost(portion: SharedInput) -> float:
        rows = statistics.rows(portion.name) if statistics else 0
        return NOMINAL.seconds(solve_work(portion, plans, prepared.settings, rows=rows))

    return sorted(portions, key=cost, reverse=True)


def solved_layers(plan: ModelPlan, work: WorkFolder) -> tuple[SolvedLayers, list[LayerReport]]:
    """Everything that `solve_model` left in the work folder, the reports in the plan's order of portions."""
    plans = {layer.name: layer for layer in plan.layers}
    places = {
        name: (LAYERS, _key(portion), plans[name]) for portion in plan.portions for name in portion.layers
    }
    reports = [report for portion in plan.portions for report in _kept_reports(work, portion)]
    return SolvedLayers(work, places), reports


@dataclass(frozen=True, slots=True)
class Solving:
    """What every portion is solved with."""

    prepared: Prepared
    statistics: Statistics | None
    device: torch.device
    options: RunOptions
    observe: Observer


def _solved(
    job: Solving, portions: Iterable[SharedInput], *, wait: Callable[[], object] = lambda: None
) -> Iterator[tuple[SharedInput, SolvedInput]]:
    """One portion after the other, as it comes from the device that it was solved on. The next one's weights are read,
    or the next few are solved (`portions_at_once`), meanwhile where there is memory for them. `wait` returns when the
    caller holds no memory for earlier ones."""
    prepared, options = job.prepared, job.options
    plans = {layer.name: layer for layer in prepared.plan.layers}
    itemsize = stored_itemsize(prepared)
    if options.max_ram is not None:
        free_tensors_at_once()
    return_freed_memory()
    at_first = (1 - SPARED) * free_ram(options)

    def need(portion: SharedInput, way: Way) -> Need:
        rows = job.statistics.rows(portion.name) if job.statistics else 0
        return need_of(way, portion, plans, prepared.settings, rows=rows, itemsize=itemsize)

    def stored(portion: SharedInput) -> int:
        return stored_bytes(portion, plans, itemsize=itemsize, pinned=job.device.type == "cuda")

    def solving(portions: Sequence[SharedInput]) -> int:
        return sum(need(each, ways_on(job.device)[0]).ram + stored(each) for each in portions)

    def read_beside(busy: Sequence[SharedInput], following: SharedInput) -> bool:
        return solving(busy) + stored(following) <= at_first

    def solved_beside(busy: Sequence[SharedInput], following: SharedInput) -> bool:
        return solving([*busy, following]) <= at_first

    def solve(portion: SharedInput, raw: dict[str, RawWeight]) -> SolvedInput:
        def let_go() -> None:
            raw.clear()
            wait()
            return_freed_memory()

        return where_it_fits(
            _key(portion),
            lambda way: _solved_so(way, job, portion, plans, raw),
            partial(need, portion),
            device=job.device,
            options=options,
            observe=job.observe,
            let_go=let_go,
        )

    read = partial(_read_ahead, prepared.source, plans, job.device)
    if at_once := portions_at_once(job.device, data_free=job.statistics is None):
        made = made_ahead(
            portions, lambda each: solve(each, read(each)), threads=at_once, beside=solved_beside
        )
        # What one frees is taken by the next: to give back everything each time costs a tenth of the processor time.
        needs = sorted(need(each, ways_on(job.device)[0]).ram for each in prepared.plan.portions)
        much = resident_ram() + 3 * sum(needs[-at_once:]) // 4
        for solved in made:
            yield solved
            if resident_ram() > much:
                return_freed_memory()
        return_freed_memory()
    else:
        for portion, raw in made_ahead(portions, read, beside=read_beside):
            yield portion, solve(portion, raw)
            return_freed_memory()


def portions_at_once(device: torch.device, *, data_free: bool) -> int:
    """How many portions are solved side by side, memory allowing, each by a thread with one core; 0 for one after the
    other by the main thread with all cores.

    A CPU does so without calibration: most of the work is small operations and products with few columns, which more
    cores do not make faster, and with one core each the sums come out the same on every machine. With calibration a
    portion can take minutes, and only the main thread can be interrupted.
    """
    return cores(MOST_AT_ONCE) if data_free and device.type == "cpu" else 0


def _solved_so(
    way: Way,
    job: Solving,
    portion: SharedInput,
    plans: Mapping[str, LayerPlan],
    raw: dict[str, RawWeight],
) -> SolvedInput:
    """`raw`: weights that were read ahead. Each is let go when it is in float32 on the device."""
    streamed = StreamedWeights(job.prepared.source, plans, portion.layers, way.device)
    if way.streamed:
        weights = streamed
    else:
        weights = {
            name: raw.pop(name).on(way.device) if name in raw else streamed[name] for name in portion.layers
        }
    stats = job.statistics(portion.name) if job.statistics else None
    return solve_input(portion, plans, weights, stats, job.prepared.settings)


def _observed(
    prepared: Prepared, solved: Iterable[tuple[SharedInput, SolvedInput]], held: int, observe: Observer
) -> Iterator[tuple[SharedInput, SolvedInput]]:
    """The same, told as progress once the caller is done with each. `held` layers were solved by an earlier run."""
    done, total = held, len(prepared.plan.layers)
    observe(Event("start", "solve", done, total))
    if held:
        observe(Event("advance", "solve", done, total, f"{held} layers taken over from an earlier run"))
    started = time.monotonic()
    for portion, each in solved:
        yield portion, each
        done += len(portion.layers)
        detail = f"{_key(portion)}  {each.reports[0].sqnr_db:.1f} dB"
        observe(Event("advance", "solve", done, total, detail, time.monotonic() - started))
    observe(Event("end", "solve", total, total, seconds=time.monotonic() - started))


def _is_finished(work: WorkFolder, portion: SharedInput, observe: Observer) -> bool:
    """A damaged file is none: what it held is solved again, and that is said."""
    if quoted(_key(portion)) not in work.taken_over:
        return False
    try:
        return {report.name for report in _kept_reports(work, portion)} == set(portion.layers)
    except (InputError, KeyError, TypeError, ValueError) as error:
        observe(Event("warning", "solve", detail=f"{_key(portion)} is solved again: {error}"))
        return False


def _kept_reports(work: WorkFolder, portion: SharedInput) -> list[LayerReport]:
    said = cast("list[dict[str, object]]", work.about(LAYERS, _key(portion))["reports"])
    return [report_of_json(each) for each in said]


# ------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True, slots=True, eq=False)
class RawWeight:
    """One linear as the source stores it."""

    weight: Tensor  # (N, K), or (N, K, 1, 1) of a 1x1 convolution
    bias: Tensor | None  # (N,)

    def on(self, device: torch.device) -> SourceWeight:
        """In float32 on `device`. From pinned memory the copy runs while the CPU goes on."""
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True).float()
        return SourceWeight(self.weight.to(device, non_blocking=True).float().flatten(1), bias)

    def pinned(self) -> RawWeight:
        """In page-locked memory, from which a GPU reads by itself; from other memory the driver copies it first, while
        the CPU waits. As it is where the system has no more such memory."""
        try:
            return RawWeight(self.weight.pin_memory(), None if self.bias is None else self.bias.pin_memory())
        except RuntimeError as error:
            if as_out_of_memory(error) is None:
                raise
            return self


@dataclass(frozen=True, slots=True)
class StreamedWeights(Mapping[str, SourceWeight]):
    """Weights of a portion, each read from the source whenever it is asked for and held by nobody."""

    source: Source
    plans: Mapping[str, LayerPlan]
    names: tuple[str, ...]
    device: torch.device

    def __getitem__(self, name: str) -> SourceWeight:
        return source_weight(self.source, self.plans[name], self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _read_ahead(
    source: Source, plans: Mapping[str, LayerPlan], device: torch.device, portion: SharedInput
) -> dict[str, RawWeight]:
    """The weights of a portion, for a GPU pinned. None of them where memory runs out: they are read again when the
    portion's turn has come and the one before it is gone."""
    try:
        raw = {name: raw_weight(source, plans[name]) for name in portion.layers}
        return {name: each.pinned() for name, each in raw.items()} if device.type == "cuda" else raw
    except (RuntimeError, MemoryError) as error:
        if as_out_of_memory(error) is None:
            raise
        return {}


def raw_weight(source: Source, plan: LayerPlan) -> RawWeight:
    """Read from the source. InputError where it holds NaN or infinity."""
    bias = finite_tensor(source, f"{plan.name}.bias") if plan.linear.bias else None
    return RawWeight(finite_tensor(source, f"{plan.name}.weight"), bias)


def source_weight(source: Source, plan: LayerPlan, device: torch.device) -> SourceWeight:
    """One linear of the source in float32 on `device`."""
    return raw_weight(source, plan).on(device)


def finite_tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor of the source. InputError where it holds NaN or infinity."""
    return require_finite(read_tensor(source, name), name, source.tensors[name])


def require_finite(tensor: torch.Tensor, name: str, entry: TensorEntry) -> torch.Tensor:
    """`tensor`, read from `entry`. InputError where it holds NaN or infinity."""
    if not is_finite(tensor):
        stored = f" (stored as {entry.origin})" if entry.origin != name else ""
        raise InputError(
            f"{entry.file}: {name}{stored} holds NaN or infinite values",
            hint="the checkpoint is damaged or its training diverged; download it again or use another",
            where=name,
            kind="not-finite",
        )
    return tensor
