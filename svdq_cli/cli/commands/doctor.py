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
    """Show versions, GPU and backends, each with a one-second self-test."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.diagnosis import diagnose

    with progress(quiet=quiet, verbose=verbose, events=events):
        report = diagnose()
    render.show(report, json=json)
    if report.status != "ok":
        raise typer.Exit(4)
