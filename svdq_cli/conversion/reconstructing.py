"""The effort `best`: after all layers are solved, every transformer block is tuned against the 16-bit block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from svdq_cli.conversion.recording import can_record, recorded
from svdq_cli.conversion.solving import Statistics, source_weight
from svdq_cli.errors import UsageError
from svdq_cli.machine import on_device
from svdq_cli.preparing import Prepared, RunOptions
from svdq_cli.reconstruct import reconstruct
from svdq_cli.records import BlockSearch, LayerReport, LayerSolution, Observer
from svdq_cli.solve.linear import measured

PICTURES = 32  # drawn to record calls of the model
BATCHES = 8  # of these pictures; the last quarter judges
CALLS = 8  # of each batch, spread over its steps


def require_blocks_run(prepared: Prepared) -> None:
    """UsageError where the blocks can't be run later, before hours are spent on the layers."""
    if not can_record(prepared):
        raise UsageError(
            "effort best runs the model's blocks, which needs the whole pipeline and prompts",
            hint="give a recipe with prompts and the pipeline (--prompts, --base), or use --effort balanced",
            where="quantization.effort",
        )


def reconstructed(
    prepared: Prepared,
    statistics: Statistics,
    solutions: Mapping[str, LayerSolution],
    reports: list[LayerReport],
    *,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> tuple[dict[str, LayerSolution], list[LayerReport], dict[str, BlockSearch]]:
    """Tuned solutions, their reports, and what tuning brought per block.

    Needs the pipeline and the recipe's prompts (`require_blocks_run`): a block is judged in the model, not on an
    artefact's rows.
    """
    model, trajectories = recorded(
        prepared,
        pictures=PICTURES,
        batches=BATCHES,
        calls=CALLS,
        options=options,
        device=device,
        observe=observe,
    )
    tuned, blocks = reconstruct(
        model, prepared.plan, solutions, trajectories, seed=prepared.settings.seed, observe=observe
    )
    return tuned, [_again(report, tuned, prepared, statistics, device) for report in reports], blocks


def _again(
    report: LayerReport,
    solutions: Mapping[str, LayerSolution],
    prepared: Prepared,
    statistics: Statistics,
    device: torch.device,
) -> LayerReport:
    """A layer's report with the figures of its tuned solution."""
    solution = solutions[report.name]
    shared = next(shared for shared in prepared.plan.inputs if report.name in shared.layers)
    weight = source_weight(prepared.source, solution.plan, device)
    rows = statistics(shared.name).rows.to(device).float()
    sqnr, error = measured(on_device(solution, device), weight, rows)
    return replace(report, sqnr_db=sqnr, weight_error=error)
