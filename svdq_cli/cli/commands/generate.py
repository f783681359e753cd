"""`svdq generate`."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import base_of, beyond_the_model, run_options


@opt.recipe_options("generate")
def generate(
    checkpoint: opt.Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to generate from.")],
    out: opt.Out,
    given: opt.Given = opt.NOTHING,
    width: opt.Width = None,
    height: opt.Height = None,
    image: opt.Image = None,
    mask: opt.Mask = None,
    video: opt.Video = None,
    strength: opt.Strength = None,
    backend: opt.Backend = "auto",
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Generate one image, video or sound with a converted checkpoint."""
    from svdq_cli.checkpoint.reader import open_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.entrypoints.generate import Inputs
    from svdq_cli.entrypoints.generate import generate as run_generate
    from svdq_cli.prepare.defaults import evaluation_recipe
    from svdq_cli.prepare.from_command_line import files_of_loras, override, parse_lora

    pipeline = base_of(given)
    loras = [parse_lora(text) for text in cast("list[str]", given.get("model.loras") or [])]
    recipe = override(
        evaluation_recipe(open_checkpoint(checkpoint, base=pipeline), str(checkpoint)),
        {"calibration.seed": 0, **beyond_the_model(given)},
    )
    # what a LoRA's name says of steps holds for those that were merged before the conversion and for these
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"loras": (*recipe.model.loras, *loras)})}
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
            inputs=Inputs(image, mask, video, strength),
            loras=files_of_loras(loras),
            base=pipeline,
            options=run_options(device, overwrite),
            observe=observe,
        )
    render.show(report, json=json)
