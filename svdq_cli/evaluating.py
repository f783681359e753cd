"""Evaluate: is the checkpoint as good as its source?"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from svdq_cli.comparing import compare_in
from svdq_cli.preparing import DEFAULT_OPTIONS, RunOptions
from svdq_cli.recipe import Recipe
from svdq_cli.records import EvalReport, Observer, ignore_events


def evaluate(
    path: Path,
    recipe: Recipe,
    *,
    report_folder: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> EvalReport:
    """Pictures of the 16-bit model (the recipe's source), of the baselines and of the checkpoint, at equal seeds.

    With `report_folder`: pictures, grid, figures, plots and the HTML report are kept there, and a run that was stopped
    goes on where it stood.
    """
    if report_folder is None:
        with tempfile.TemporaryDirectory(prefix="svdq-eval-") as folder:
            return compare_in(Path(folder), path, recipe, options=options, observe=observe).report
    # Imports matplotlib, which takes a while
    from svdq_cli.plotting import search_of
    from svdq_cli.reporting import PAGE_FILE, write_report

    search = search_of(path)  # refuses a damaged report now, not after the long work
    found = compare_in(report_folder, path, recipe, options=options, observe=observe)
    found = replace(found, report=replace(found.report, page=str(report_folder / PAGE_FILE)))
    write_report(report_folder, found, recipe, search=search)
    return found.report
