"""`svdq check`."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import base_of, recipe_for, run_options


@opt.recipe_options("check")
def check(
    checkpoint: opt.Checkpoint,
    against: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The 16-bit model it was made from.")
    ] = None,
    given: opt.Given = opt.NOTHING,
    json: opt.Json = False,
    summary: opt.SummaryFile = None,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check structure, finite values and, against the source, the reconstruction of every layer."""
    from svdq_cli.checkpoint.check import check as run_check
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.cli.summary import append_summary
    from svdq_cli.entrypoints.check import check_against

    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        if against is None:
            report = run_check(checkpoint, base=base_of(given), observe=observe)
        else:
            recipe, options = recipe_for(against, given, options=run_options("cpu", False))
            report = check_against(checkpoint, recipe, options=options, observe=observe)
    append_summary(report, summary)
    render.show(report, json=json, verbose=verbose)
    render.exit_with(report)
