"""`svdq init`."""

from __future__ import annotations

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import rank_of


def init(
    source: opt.Source,
    out: opt.Out,
    precision: opt.Precision = None,
    rank: opt.Rank = None,
    effort: opt.Effort = None,
    family: opt.Family = None,
    base: opt.Base = None,
    denoiser: opt.Denoiser = None,
    loras: opt.Loras = None,
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
        report = write_recipe(
            source,
            out,
            overwrite=overwrite,
            precision=precision,
            rank=rank_of(rank),
            effort=effort,
            family=family,
            base=base,
            denoiser=denoiser,
            loras=loras,
        )
    render.show(report, json=json)
