"""`svdq init`."""

from __future__ import annotations

from svdq_cli.cli import options as opt


@opt.recipe_options("init")
def init(
    source: opt.Source,
    out: opt.Out,
    given: opt.Given = opt.NOTHING,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write a complete, commented recipe for a model."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.init import write_recipe

    with progress(quiet=quiet, verbose=verbose, events=events):
        report = write_recipe(source, out, given, overwrite=overwrite)
    render.show(report, json=json)
