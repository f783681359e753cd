"""`svdq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import base_of, recipe_for, run_options


@opt.recipe_options("inspect")
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="SOURCE|CKPT", help="A 16-bit model or a converted checkpoint.")
    ],
    given: opt.Given = opt.NOTHING,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show family, layers and sizes; for a checkpoint also format, precision, rank and provenance."""
    from svdq_cli.checkpoint.detect import looks_like_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.inspect import inspect_checkpoint, inspect_source
    from svdq_cli.prepare.from_command_line import rules_named
    from svdq_cli.storage.library_facts import kept_library_facts

    with progress(quiet=quiet, verbose=verbose, events=events), rules_named(target), kept_library_facts():
        if looks_like_checkpoint(Path(target)):
            report = inspect_checkpoint(Path(target), base=base_of(given))
        else:
            recipe, run = recipe_for(target, given, options=run_options("cpu", False))
            report = inspect_source(recipe, options=run)
    render.show(report, json=json, verbose=verbose)
