"""`svdq demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import run_options


def demo(
    out: opt.Out = Path("svdq-demo"),
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Only write the embedded model to this folder, as a diffusers pipeline."
        ),
    ] = None,
    outliers: Annotated[
        bool,
        typer.Option(
            "--outliers", help="Run only the stress variant, whose activations have strong outliers."
        ),
    ] = False,
    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Run only the LoRA demo: the 4-bit model with a folded LoRA next to the 16-bit model with it.",
        ),
    ] = False,
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Run the whole job on the embedded model: calibrate, convert, check and evaluate, with images and a table."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress

    if export is not None:
        from svdq_cli.entrypoints.demo import export_model

        render.show(export_model(export, outliers=outliers, overwrite=overwrite), json=json)
        return
    if lora:
        from svdq_cli.entrypoints.demo_lora import demo_lora

        with progress(quiet=quiet, verbose=verbose, events=events) as observe:
            told = demo_lora(out, options=run_options(device, overwrite), observe=observe)
        render.show(told, json=json)
        return
    from svdq_cli.entrypoints.demo import demo as run_demo
    from svdq_cli.prepare.locate import DEMO_SOURCES

    sources = ("demo:outliers",) if outliers else DEMO_SOURCES
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_demo(out, sources=sources, options=run_options(device, overwrite), observe=observe)
    render.show(report, json=json)
