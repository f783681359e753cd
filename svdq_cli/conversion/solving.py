"""All layers of a model, solved one shared input after the other; each is kept in the work folder as soon as it is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

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

LEFT = "left"  # topic: the inputs that are still to be solved


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
    """Every layer, in the plan's order of inputs. Solutions come back on the CPU, all of them in memory."""
    solutions: dict[str, LayerSolution] = {}
    reports: list[LayerReport] = []
    inputs = prepared.plan.inputs
    for _, solved in _observed(prepared, _solved(prepared, statistics, inputs, device), 0, observe):
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
    left = [shared for shared in prepared.plan.inputs if not _is_finished(work, shared, observe)]
    held = len(prepared.plan.layers) - sum(len(shared.layers) for shared in left)
    if team.size > 1:
        left = _longest_first(left, prepared, statistics)
        team.tell(LEFT, {"inputs": [shared.name for shared in left]})
    mine = team.claims(LEFT, left)
    with done_behind() as keep:
        for shared, solved in _observed(prepared, _solved(prepared, statistics, mine, device), held, observe):
            keep(partial(_keep, work, shared, solved))
    team.gather(LEFT)
    wait_for_files(work.path, lambda: [each.name for each in left if not work.has(LAYERS, each.name)])
    return held


def solve_share(
    work: WorkFolder, prepared: Prepared, statistics: Statistics | None, device: torch.device, team: Team
) -> None:
    """What a process other than the first does of `solve_into`."""
    inputs = {shared.name: shared for shared in prepared.plan.inputs}
    left = [inputs[name] for name in cast("list[str]", team.hear(LEFT)["inputs"])]
    with done_behind() as keep:
        for shared, solved in _solved(prepared, statistics, team.claims(LEFT, left), device):
            keep(partial(_keep, work, shared, solved))
    team.done(LEFT)


def _keep(work: WorkFolder, shared: SharedInput, solved: SolvedInput) -> None:
    reports = [report_json(report) for report in solved.reports]
    work.keep(LAYERS, shared.name, (*solved.w4a4, *solved.w4a16), {"reports": reports})


def _longest_first(
    inputs: Sequence[SharedInput], prepared: Prepared, statistics: Statistics | None
) -> list[SharedInput]:
    plans = {layer.name: layer for layer in prepared.plan.layers}

    def cost(shared: SharedInput) -> float:
        rows = statistics.rows(shared.name) if statistics else 0
        return NOMINAL.seconds(solve_work(shared, plans, prepared.settings, rows=rows))

    return sorted(inputs, key=cost, reverse=True)


def solved_layers(plan: ModelPlan, work: WorkFolder) -> tuple[SolvedLayers, list[LayerReport]]:
    """Everything that `solve_model` left in the work folder, the reports in the plan's order of inputs."""
    plans = {layer.name: layer for layer in plan.layers}
    places = {name: (LAYERS, shared.name, plans[name]) for shared in plan.inputs for name in shared.layers}
    reports = [report for shared in plan.inputs for report in _kept_reports(work, shared)]
    return SolvedLayers(work, places), reports


def _solved(
    prepared: Prepared, statistics: Statistics | None, inputs: Iterable[SharedInput], device: torch.device
) -> Iterator[tuple[SharedInput, SolvedInput]]:
    """One input after the other, solved on `device` and brought back to the CPU."""
    plans = {layer.name: layer for layer in prepared.plan.layers}

    def solve(shared: SharedInput, raw: Mapping[str, RawWeight]) -> SolvedInput:
        weights = {name: each.on(device) for name, each in raw.items()}
        stats = statistics(shared.name) if statistics else None
        return _on_cpu(solve_input(shared, plans, weights, stats, prepared.settings))

    def read(shared: SharedInput) -> dict[str, RawWeight]:
        return {name: raw_weight(prepared.source, plans[name]) for name in shared.layers}

    for shared, raw in made_ahead(inputs, read):
        yield shared, solve(shared, raw)


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
    for shared, each in solved:
        yield shared, each
        done += len(shared.layers)
        detail = f"{shared.name}  {each.reports[0].sqnr_db:.1f} dB"
        observe(Event("advance", "solve", done, total, detail, time.monotonic() - started))
    observe(Event("end", "solve", total, total, seconds=time.monotonic() - started))


def _is_finished(work: WorkFolder, shared: SharedInput, observe: Observer) -> bool:
    """A damaged file is none: what it held is solved again, and that is said."""
    if quoted(shared.name) not in work.taken_over:
        return False
    try:
        return {report.name for report in _kept_reports(work, shared)} == set(shared.layers)
    except (InputError, KeyError, ValueError) as error:
        observe(Event("warning", "solve", detail=f"{shared.name} is solved again: {error}"))
        return False


def _kept_reports(work: WorkFolder, shared: SharedInput) -> list[LayerReport]:
    said = cast("list[dict[str, object]]", work.about(LAYERS, shared.name)["reports"])
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
