"""Gates on speed: what the measured rows say of the layers that matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from svdq_cli.bench.report import BenchReport, SpeedRatio, layer_ratios
from svdq_cli.recipe import Gate, figure_of
from svdq_cli.reports import to_json


def judged(report: BenchReport, gates: Sequence[Gate]) -> BenchReport:
    """The report with its speed ratio, marked with the gates that it misses. A gate on a figure that was not measured
    is missed."""
    ratios = [row.ratio for row in layer_ratios(report.rows)]
    report = replace(report, speed_ratio=SpeedRatio(fmean(ratios), min(ratios)) if ratios else None)
    plain = to_json(report)
    figures = {gate: figure_of(gate, plain) for gate in gates}
    missed = tuple(
        f"{gate} (is {'not measured' if value is None else f'{value:.4g}'})"
        for gate, value in figures.items()
        if value is None or not gate.holds(value)
    )
    return replace(report, gates_missed=missed, status="gate-missed" if missed else report.status)
