"""The effort `best`: after all layers are solved, every transformer block is tuned against the 16-bit block.

A block is kept in the work folder as soon as it is tuned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, replace
from typing import cast

import torch

from svdq_cli.conversion.block_by_block import Way, reconstructions
from svdq_cli.conversion.read_weights import source_weight
from svdq_cli.conversion.record import BLOCK_SAMPLE
from svdq_cli.conversion.solve_layers import Statistics
from svdq_cli.conversion.work_folder import BLOCKS, SolvedLayers, WorkFolder, report_json, report_of_json
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.reconstruct import Recording, TunedBlock, blocks_of, reconstruct
from svdq_cli.records import Event, LayerReport, LayerSolution, Observer
from svdq_cli.reports import BlockSearch
from svdq_cli.solve.linear import measured
from svdq_cli.source import prefix_of
from svdq_cli.system.machine import on_device


def tune_blocks(
    prepared: Prepared,
    sampling: Sampling,
    statistics: Statistics,
    solved: SolvedLayers,
    reports: list[LayerReport],
    *,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> tuple[SolvedLayers, list[LayerReport], dict[str, BlockSearch]]:
    """All layers with the blocks tuned, their reports, and what tuning brought per block.

    Blocks that the work folder of `solved` holds already are not tuned again. `sampling`: of the images that they are
    tuned on, from the pipeline and the recipe's prompts: a block is judged in the model, not on an artefact's rows.
    """
    work, blocks = solved.work, blocks_of(prepared.plan)
    finished = [block for block in blocks if _is_finished(work, block, observe)]
    if len(finished) < len(blocks):
        before, cpu = {report.name: report for report in reports}, torch.device("cpu")
        for tuned in _tuned(
            prepared, sampling, _overlaid(solved, finished), finished, options, device, observe
        ):
            again = [
                _again(before[name], solution, prepared, statistics, device)
                for name, solution in tuned.solutions.items()
            ]
            about = {"search": asdict(tuned.search), "reports": [report_json(report) for report in again]}
            work.keep(BLOCKS, tuned.name, [on_device(each, cpu) for each in tuned.solutions.values()], about)
    finished = [block for block in blocks if work.has(BLOCKS, block)]
    tuned_reports = {report.name: report for block in finished for report in _kept_reports(work, block)}
    return (
        _overlaid(solved, finished),
        [tuned_reports.get(report.name, report) for report in reports],
        {block: _kept_search(work, block) for block in finished},
    )


def _tuned(
    prepared: Prepared,
    sampling: Sampling,
    solved: SolvedLayers,
    finished: Collection[str],
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> Iterator[TunedBlock]:
    def left(component: str, recording: Recording) -> bool:
        prefix = prefix_of(prepared.source.components, component)
        return not all(prefix + block in finished for block in recording.block_graph.order)

    way = Way(prepared, sampling, BLOCK_SAMPLE, solved, options, device, observe, tuned=True)
    for prefix, job in reconstructions(way, left):
        for tuned in reconstruct(
            job,
            seed=prepared.settings.seed,
            finished={block.removeprefix(prefix) for block in finished if block.startswith(prefix)},
            observe=observe,
        ):
            named = {prefix + name: solution for name, solution in tuned.solutions.items()}
            yield replace(tuned, name=prefix + tuned.name, solutions=named)


def _again(
    report: LayerReport,
    solution: LayerSolution,
    prepared: Prepared,
    statistics: Statistics,
    device: torch.device,
) -> LayerReport:
    """A layer's report with the figures of its tuned solution."""
    shared = next(shared for shared in prepared.plan.inputs if report.name in shared.layers)
    weight = source_weight(prepared.source, solution.plan, device)
    seen = statistics(shared.name)
    rows = seen.rows.to(device).float()
    sqnr, error = measured(on_device(solution, device), weight, rows, seen.mean)
    return replace(report, sqnr_db=sqnr, weight_error=error)


# ------------------------------------------------------------------------------------------------- what is kept


def _is_finished(work: WorkFolder, block: str, observe: Observer) -> bool:
    """The stored report of a tuned block; None, with a warning, where the file is damaged."""
    if not work.has(BLOCKS, block):
        return False
    try:
        _kept_reports(work, block)
        _kept_search(work, block)
    except (InputError, KeyError, TypeError, ValueError) as error:
        observe(Event("warning", "reconstruct", detail=f"{block} is tuned again: {error}"))
        work.discard(BLOCKS, block)
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


def _kept_reports(work: WorkFolder, block: str) -> list[LayerReport]:
    said = cast("list[dict[str, object]]", work.about(BLOCKS, block)["reports"])
    return [report_of_json(each) for each in said]


def _kept_search(work: WorkFolder, block: str) -> BlockSearch:
    return BlockSearch(**cast("dict[str, float]", work.about(BLOCKS, block)["search"]))
