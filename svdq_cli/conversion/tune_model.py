"""The effort `best`: after all layers are solved, each denoiser is tuned, as a whole, against the 16-bit one.

Its blocks are kept in the work folder once it is tuned, and then a note that they all are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import cast

import torch

from svdq_cli.conversion.block_by_block import Way, reconstructions
from svdq_cli.conversion.read_weights import source_weight
from svdq_cli.conversion.record import tuning_sample
from svdq_cli.conversion.solve_layers import Statistics
from svdq_cli.conversion.work_folder import (
    BLOCKS,
    TUNED,
    SolvedLayers,
    WorkFolder,
    report_json,
    report_of_json,
)
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.reconstruct import Recording, tune_model
from svdq_cli.records import Event, LayerReport, LayerSolution, Observer, W4A4Solution
from svdq_cli.reports import TuningSearch
from svdq_cli.solve.linear import measured
from svdq_cli.system.machine import on_device


def tune_denoisers(
    prepared: Prepared,
    sampling: Sampling,
    statistics: Statistics,
    solved: SolvedLayers,
    reports: list[LayerReport],
    *,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> tuple[SolvedLayers, list[LayerReport], dict[str, TuningSearch]]:
    """All layers as they are tuned, their reports, and what tuning brought per denoiser.

    A denoiser that the work folder of `solved` holds already is not tuned again. `sampling`: of the images that it is
    tuned on, from the pipeline and the recipe's prompts: it is judged by what it puts out, not on an artefact's rows.
    """
    work, components = solved.work, prepared.source.components
    left = {name for name in components if not _is_tuned(work, name, observe)}

    def wanted(component: str, recording: Recording) -> bool:
        return component in left

    if left:
        before, cpu = {report.name: report for report in reports}, torch.device("cpu")
        way = Way(
            prepared,
            sampling,
            tuning_sample(prepared, sampling),
            solved,
            options,
            device,
            observe,
            tuned=True,
        )
        for prefix, job in reconstructions(way, wanted):
            search, blocks = tune_model(job, seed=prepared.settings.seed, observe=observe)
            kept: list[str] = []
            for block, solutions in blocks:
                named = {prefix + name: solution for name, solution in solutions.items()}
                again = _again(before, named, prepared, statistics, device)
                kept.append(prefix + block)
                stored = [on_device(each, cpu) for each in named.values()]
                work.keep(BLOCKS, kept[-1], stored, {"reports": [report_json(each) for each in again]})
            about = {"search": asdict(search), "blocks": kept}
            work.keep_tensors(TUNED, job.plan.components[0], {}, about)
    blocks = [block for component in components for block in _kept_blocks(work, component)]
    tuned_reports = {report.name: report for block in blocks for report in _kept_reports(work, block)}
    return (
        _overlaid(solved, blocks),
        [tuned_reports.get(report.name, report) for report in reports],
        {component: _kept_search(work, component) for component in components},
    )


def _again(
    before: dict[str, LayerReport],
    solutions: dict[str, W4A4Solution],
    prepared: Prepared,
    statistics: Statistics,
    device: torch.device,
) -> list[LayerReport]:
    """Layers' reports with the figures of their tuned solutions."""
    return [
        _measured_again(before[name], solution, prepared, statistics, device)
        for name, solution in solutions.items()
    ]


def _measured_again(
    report: LayerReport,
    solution: LayerSolution,
    prepared: Prepared,
    statistics: Statistics,
    device: torch.device,
) -> LayerReport:
    shared = next(shared for shared in prepared.plan.inputs if report.name in shared.layers)
    weight = source_weight(prepared.source, solution.plan, device)
    seen = statistics(shared.name)
    rows = seen.rows.to(device).float()
    sqnr, error = measured(on_device(solution, device), weight, rows, seen.mean)
    return replace(report, sqnr_db=sqnr, weight_error=error)


# ------------------------------------------------------------------------------------------------- what is kept


def _is_tuned(work: WorkFolder, component: str, observe: Observer) -> bool:
    """Whether a denoiser is tuned already. Where a file is damaged, it is not, with a warning."""
    if not work.has(TUNED, component):
        return False
    try:
        _kept_search(work, component)
        for block in _kept_blocks(work, component):
            _kept_reports(work, block)
    except (InputError, KeyError, TypeError, ValueError) as error:
        observe(Event("warning", "reconstruct", detail=f"{component} is tuned again: {error}"))
        work.discard(TUNED, component)
        return False
    return True


def _overlaid(solved: SolvedLayers, blocks: Iterable[str]) -> SolvedLayers:
    """The solved layers; those of tuned blocks as they were tuned."""
    tuned = {
        report.name: (BLOCKS, block, solved.places[report.name][2])
        for block in blocks
        for report in _kept_reports(solved.work, block)
    }
    return replace(solved, places={**solved.places, **tuned})


def _kept_blocks(work: WorkFolder, component: str) -> list[str]:
    return cast("list[str]", work.about(TUNED, component)["blocks"])


def _kept_reports(work: WorkFolder, block: str) -> list[LayerReport]:
    said = cast("list[dict[str, object]]", work.about(BLOCKS, block)["reports"])
    return [report_of_json(each) for each in said]


def _kept_search(work: WorkFolder, component: str) -> TuningSearch:
    return TuningSearch(**cast("dict[str, float]", work.about(TUNED, component)["search"]))
