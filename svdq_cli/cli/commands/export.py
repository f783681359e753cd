"""`svdq export`."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import base_of, run_options
from svdq_cli.formats import NAMES


@opt.recipe_options("export")
def export(
    checkpoint: opt.Checkpoint,
    to: Annotated[
        str,
        typer.Option("--to", metavar="|".join(NAMES), help="Output format."),
    ],
    out: opt.Out,
    given: opt.Given = opt.NOTHING,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Re-pack a checkpoint for another runtime without quantizing again, bit for bit."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.export import export as run_export

    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_export(
            checkpoint, to, out, base=base_of(given), options=run_options("cpu", overwrite), observe=observe
        )
    render.show(report, json=json)
