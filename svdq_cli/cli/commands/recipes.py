"""`svdq recipes`."""

from __future__ import annotations

from svdq_cli.cli import options as opt


def recipes(
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """List the recipes that ship with svdq. `svdq convert NAME` converts with one, `svdq init NAME -o FILE.yaml` copies
    it to be changed."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.init import list_recipes

    with progress(quiet=quiet, verbose=verbose, events=events):
        report = list_recipes()
    render.show(report, json=json, verbose=verbose)
