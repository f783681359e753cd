"""`svdq generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import override, run_options


def generate(
    checkpoint: opt.Checkpoint,
    prompt: Annotated[str, typer.Option(help="What to generate.")],
    out: opt.Out,
    steps: opt.Steps = None,
    width: opt.Width = None,
    height: opt.Height = None,
    seed: opt.ImageSeed = None,
    image: opt.Image = None,
    mask: opt.Mask = None,
    strength: opt.Strength = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Frames of a video (default: the model's own).")
    ] = None,
    base: opt.Base = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="auto|kernels|kernels:MODE|cpu|reference",
            help="What computes the 4-bit layers. MODE, on Hopper: exact, w4a8, fp8.",
        ),
    ] = "auto",
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Generate one image, or one video, with a converted checkpoint."""
    from svdq_cli.checkpoint.reader import open_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.generate import Inputs
    from svdq_cli.entrypoints.generate import generate as run_generate
    from svdq_cli.prepare.defaults import evaluation_recipe
    from svdq_cli.prepare.locate import locate_base

    pipeline = locate_base(base) if base else None
    recipe = override(
        evaluation_recipe(open_checkpoint(checkpoint, base=pipeline), str(checkpoint)),
        steps=steps,
        seed=0 if seed is None else seed,
    )
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_generate(
            checkpoint,
            prompt,
            out,
            recipe=recipe,
            backend=backend,
            width=width,
            height=height,
            inputs=Inputs(image, mask, strength, frames),
            base=pipeline,
            options=run_options(device, overwrite),
            observe=observe,
        )
    render.show(report, json=json)
