"""All layers of a model, solved one shared input after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from svdq_cli.calibrate.artefact import Calibration
from svdq_cli.errors import InputError
from svdq_cli.machine import on_device
from svdq_cli.preparing import Prepared
from svdq_cli.records import ActivationStats, Event, LayerPlan, LayerReport, LayerSolution, Observer
from svdq_cli.solve.forward import SourceWeight
from svdq_cli.solve.linear import solve_input
from svdq_cli.source import Source, TensorEntry, read_tensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """Calibration statistics, drawn just now or opened from an artefact."""

    digest: str
    of: Mapping[str, ActivationStats] | Calibration

    def __call__(self, name: str) -> ActivationStats:
        return self.of.stats(name) if isinstance(self.of, Calibration) else self.of[name]


def solve_model(
    prepared: Prepared, statistics: Statistics | None, device: torch.device, observe: Observer
) -> tuple[dict[str, LayerSolution], list[LayerReport]]:
    """Every layer, in the plan's order of inputs. Solutions come back on the CPU."""
    plans = {layer.name: layer for layer in prepared.plan.layers}
    solutions: dict[str, LayerSolution] = {}
    reports: list[LayerReport] = []
    total = len(plans)
    observe(Event("start", "solve", 0, total))
    started = time.monotonic()
    for shared in prepared.plan.inputs:
        weights = {name: source_weight(prepared.source, plans[name], device) for name in shared.layers}
        stats = statistics(shared.name) if statistics else None
        solved = solve_input(shared, plans, weights, stats, prepared.settings)
        for solution in (*solved.w4a4, *solved.w4a16):
            solutions[solution.plan.name] = on_device(solution, torch.device("cpu"))
        reports += solved.reports
        detail = f"{shared.name}  {solved.reports[0].sqnr_db:.1f} dB"
        observe(Event("advance", "solve", len(solutions), total, detail, time.monotonic() - started))
    observe(Event("end", "solve", total, total, seconds=time.monotonic() - started))
    return solutions, reports


def source_weight(source: Source, plan: LayerPlan, device: torch.device) -> SourceWeight:
    """One linear of the source in float32 on `device`."""
    weight = finite_tensor(source, f"{plan.name}.weight")
    bias = finite_tensor(source, f"{plan.name}.bias").to(device).float() if plan.linear.bias else None
    return SourceWeight(weight.to(device).float().flatten(1), bias)  # a 1x1 convolution is (N, K, 1, 1)


def finite_tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor of the source. InputError where it holds NaN or infinity."""
    return require_finite(read_tensor(source, name), name, source.tensors[name])


def require_finite(tensor: torch.Tensor, name: str, entry: TensorEntry) -> torch.Tensor:
    """`tensor`, read from `entry`. InputError where it holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        stored = f" (stored as {entry.origin})" if entry.origin != name else ""
        raise InputError(
            f"{entry.file}: {name}{stored} holds NaN or infinite values",
            hint="the checkpoint is damaged or its training diverged; download it again or use another",
            where=name,
            kind="not-finite",
        )
    return tensor
