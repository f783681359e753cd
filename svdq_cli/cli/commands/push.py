"""`svdq push`."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_cli.cli import options as opt


def push(
    checkpoint: opt.Checkpoint,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private if it is new.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check, and list what would be uploaded.")
    ] = False,
    json: opt.Json = False,
    summary: opt.SummaryFile = None,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Upload a checkpoint that passes its check to the Hugging Face Hub, with its model card."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.cli.summary import append_summary
    from svdq_cli.entrypoints.push import push as run_push

    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_push(checkpoint, repository, private=private, dry_run=dry_run, observe=observe)
    append_summary(report, summary)
    render.show(report, json=json)
