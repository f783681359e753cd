"""All layers of a model, solved one portion after the other; each is kept in the work folder as soon as it is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from svdq_cli.allocator import return_freed_memory
from svdq_cli.calibrate.artefact import Calibration
from svdq_cli.conversion.working import wait_for_files
from svdq_cli.errors import InputError
from svdq_cli.journal import LAYERS, SolvedLayers, WorkFolder, quoted, report_json, report_of_json
from svdq_cli.machine import on_device
from svdq_cli.overlap import done_behind, made_ahead
from svdq_cli.parallel import ALONE, Team
from svdq_cli.preparing import Prepared
from svdq_cli.records import (
    ActivationStats,
    Event,
    LayerPlan,
    LayerReport,
    LayerSolution,
    ModelPlan,
    Observer,
    SharedInput,
)
from svdq_cli.solve.costs import NOMINAL, solve_work
from svdq_cli.solve.forward import SourceWeight
from svdq_cli.solve.linear import SolvedInput, solve_input
from svdq_cli.source import Source, TensorEntry, is_finite, read_tensor

LEFT = "left"  # topic: the portions that are still to be solved


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
    portions = prepared.plan.portions
    for _, solved in _observed(prepared, _solved(prepared, statistics, portions, device), 0, observe):
        solutions |= {solution.plan.name: solution for solution in (*solved.w4a4, *solved.w4a16)}
        reports += solved.reports
    return solutions, reports


def solve_into(
    work: WorkFolder,
    prepared: Prepared,
    statistics: Statistics | None,
    device: torch.device,
    observe: Observer,
    *,
    team: Team = ALONE,
) -> int:
    """Every layer that the work folder does not hold yet. Returns how many it held. Other processes take their part of
    the layers in `solve_share`."""
    left = [portion for portion in prepared.plan.portions if not _is_finished(work, portion, observe)]
    held = len(prepared.plan.layers) - sum(len(portion.layers) for portion in left)
    if team.size > 1:
        left = _longest_first(left, prepared, statistics)
        team.tell(LEFT, {"portions": [_key(portion) for portion in left]})
    mine = team.claims(LEFT, left)
    with done_behind() as keep:
        for portion, solved in _observed(
            prepared, _solved(prepared, statistics, mine, device), held, observe
        ):
            keep(partial(_keep, work, portion, solved))
    team.gather(LEFT)
    wait_for_files(work.path, lambda: [_key(each) for each in left if not work.has(LAYERS, _key(each))])
    return held


def solve_share(
    work: WorkFolder, prepared: Prepared, statistics: Statistics | None, device: torch.device, team: Team
) -> None:
    """What a process other than the first does of `solve_into`."""
    portions = {_key(portion): portion for portion in prepared.plan.portions}
    left = [portions[key] for key in cast("list[str]", team.hear(LEFT)["portions"])]
    with done_behind() as keep:
        for portion, solved in _solved(prepared, statistics, team.claims(LEFT, left), device):
            keep(partial(_keep, work, portion, solved))
    team.done(LEFT)


def _key(portion: SharedInput) -> str:
    """Its name in the work folder."""
    return portion.layers[0]


def _keep(work: WorkFolder, portion: SharedInput, solved: SolvedInput) -> None:
    reports = [report_json(report) for report in solved.reports]
    work.keep(LAYERS, _key(portion), (*solved.w4a4, *solved.w4a16), {"reports": reports})


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


def _solved(
    prepared: Prepared, statistics: Statistics | None, portions: Iterable[SharedInput], device: torch.device
) -> Iterator[tuple[SharedInput, SolvedInput]]:
    """One portion after the other, solved on `device` and brought back to the CPU."""
    plans = {layer.name: layer for layer in prepared.plan.layers}

    def solve(portion: SharedInput, raw: Mapping[str, RawWeight]) -> SolvedInput:
        weights = {name: each.on(device) for name, each in raw.items()}
        stats = statistics(portion.name) if statistics else None
        return _on_cpu(solve_input(portion, plans, weights, stats, prepared.settings))

    def read(portion: SharedInput) -> dict[str, RawWeight]:
        return {name: raw_weight(prepared.source, plans[name]) for name in portion.layers}

    for portion, raw in made_ahead(portions, read):
        yield portion, solve(portion, raw)
        return_freed_memory()


def _on_cpu(solved: SolvedInput) -> SolvedInput:
    cpu = torch.device("cpu")
    return replace(
        solved,
        w4a4=tuple(on_device(solution, cpu) for solution in solved.w4a4),
        w4a16=tuple(on_device(solution, cpu) for solution in solved.w4a16),
    )


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
    except (InputError, KeyError, ValueError) as error:
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
        """In float32 on `device`."""
        bias = None if self.bias is None else self.bias.to(device).float()
        return SourceWeight(self.weight.to(device).float().flatten(1), bias)


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
