"""Gates of an evaluation: refused before the work where nothing could meet them, judged after it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.evaluation.passes import FIGURES
from svdq_cli.metrics import METRICS
from svdq_cli.metrics.fid import SAMPLES
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.sampling import has_frames
from svdq_cli.recipe import Gate, Recipe, figure_of, section_of
from svdq_cli.reports import EvalReport, to_json
from svdq_cli.source import Source

_VIDEO = "video"  # the report's key


def require_measurable(
    gates: Iterable[Gate],
    source: Source,
    settings: SamplingSettings,
    device: torch.device,
    *,
    images: int,
    without: Collection[str],
) -> None:
    """Raises UsageError for a gate on a figure that this evaluation will not have, and EnvironmentLacksError for one
    whose package or weights are missing, with the cure: not after hours of sampling."""
    left_out = {figure: key for key, figure in FIGURES.items() if key in without}
    for gate in gates:
        section = section_of(gate)
        if key := left_out.get(section):
            raise UsageError(
                f"gate {gate} can't be measured without the pass {key!r}", hint=f"leave out --without {key}"
            )
        if section == _VIDEO and not has_frames(source, settings):
            raise UsageError(
                f"gate {gate} can't be measured: these are images, without frames",
                hint="leave it out, or give a gate on psnr_db, ssim or another figure of images",
            )
        if (metric := METRICS.get(section)) is not None and not metric.always:
            try:
                metric.load(device, images)
            except EnvironmentLacksError as lack:
                refusal = UsageError if lack.where == SAMPLES else EnvironmentLacksError
                hint = f"{lack.hint}; or leave the gate out"
                raise refusal(
                    f"gate {gate} can't be measured: {lack.message}", hint=hint, where=lack.where
                ) from lack


def gated(report: EvalReport, recipe: Recipe) -> EvalReport:
    """The gates that were missed; a metric that could not be measured counts as missed."""
    plain = to_json(report)
    compared = {"video", *(key for key, metric in METRICS.items() if metric.kind != "image")}
    missed: list[str] = []
    for gate in recipe.gates:
        value, section = figure_of(gate, plain), section_of(gate)
        if value is not None and section in compared and report.sixteen_bit_images.meaningless:
            missed.append(f"{gate} (is {value:.4g}, which is meaningless: {report.warnings[-1]})")
        elif value is not None and not gate.holds(value):
            missed.append(f"{gate} (is {value:.4g})")
        elif section == "video" and value is None:
            missed.append(f"{gate} (not measured: {'no sound' if report.video else 'these are images'})")
        elif section in plain and plain[section] is None:
            why = report.missing.get(section, "no such metric")
            missed.append(f"{gate} (not measured: {why})")
    if not missed:
        return report
    return replace(report, status="gate-missed", gates_missed=tuple(missed))
