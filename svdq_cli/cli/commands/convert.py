"""`svdq convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import rank_of, recipe_for, run_options


def convert(
    source: opt.Source,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write (else: the recipe's).")
    ] = None,
    calib: Annotated[
        Path | None, typer.Option("--calib", metavar="CALIB", help="A finished svdq calibrate folder.")
    ] = None,
    precision: opt.Precision = None,
    rank: opt.Rank = None,
    effort: opt.Effort = None,
    formats: opt.Formats = None,
    prompts: opt.Prompts = None,
    samples: opt.Samples = None,
    steps: opt.Steps = None,
    width: opt.Width = None,
    height: opt.Height = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    family: opt.Family = None,
    base: opt.Base = None,
    loras: opt.Loras = None,
    plan: Annotated[bool, typer.Option("--plan", help="Predict layers, bytes and disk; do nothing.")] = False,
    fail_if: opt.FailIf = None,
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Search, quantize, pack and check: a 16-bit model becomes a 4-bit checkpoint."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.pipeline import convert as run_convert
    from svdq_cli.pipeline import predict
    from svdq_cli.starting import outputs_of

    recipe, run = recipe_for(
        source,
        options=run_options(device, overwrite),
        precision=precision,
        rank=rank_of(rank),
        effort=effort,
        family=family,
        base=base,
        loras=loras,
        prompts=prompts,
        samples=samples,
        steps=steps,
        width=width,
        height=height,
        batch_size=batch_size,
        seed=seed,
        out=out,
        formats=formats,
        fail_if=fail_if,
    )
    if plan:
        render.show(predict(recipe, options=run, calibration=calib), json=json, verbose=verbose)
        return
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_convert(recipe, outputs_of(recipe), calibration=calib, options=run, observe=observe)
    render.show(report, json=json, verbose=verbose)
    render.exit_on_missed_gates(report.gates_missed, json=json)
