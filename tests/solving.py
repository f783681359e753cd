"""All layers of a small model, data-free and in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from svdq_cli.conversion.solve_layers import load_solved, solve_into
from svdq_cli.conversion.work_folder import WorkFolder
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.records import LayerSolution, ignore_events


def solved_in(folder: Path, prepared: Prepared) -> dict[str, LayerSolution]:
    """By way of a work folder."""
    folder.mkdir()
    work = WorkFolder(folder)
    solve_into(work, prepared, None, torch.device("cpu"), ignore_events)
    return dict(load_solved(prepared.plan, work, data_free=True)[0])
