"""`svdq doctor`."""

from __future__ import annotations

import typer

from svdq_cli.cli import options as opt


def doctor(
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what this machine can do: versions, GPU, memory, disk, and a self-test of every backend."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.doctor import diagnose

    with progress(quiet=quiet, verbose=verbose, events=events):
        report = diagnose()
    render.show(report, json=json, verbose=verbose)
    if report.status != "ok":
        raise typer.Exit(4)
