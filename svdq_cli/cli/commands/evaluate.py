"""`svdq eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import beyond_the_model, of_the_model, run_options

Against = Annotated[str, typer.Option(metavar="SOURCE", help="The 16-bit model to compare with.")]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Save images, figures and report.html in this folder; a second run generates only what is missing.",
    ),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PASS,...",
        help="Passes to skip: naive, floor, own-noise, outputs or nf4; --plan explains each.",
    ),
]
Plan = Annotated[
    bool,
    typer.Option("--plan", help="List the passes, their purpose and their predicted time; run nothing."),
]


@opt.recipe_options("eval")
def evaluate(
    checkpoint: opt.Checkpoint,
    against: Against,
    report: Report = None,
    given: opt.Given = opt.NOTHING,
    image: opt.Image = None,
    mask: opt.Mask = None,
    video: opt.Video = None,
    strength: opt.Strength = None,
    without: Without = None,
    plan: Plan = False,
    backend: opt.Backend = "auto",
    device: opt.Device = "auto",
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    summary: opt.SummaryFile = None,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare images of both models at equal seeds: PSNR, SSIM and other installed metrics, next to baselines."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.cli.summary import append_summary
    from svdq_cli.entrypoints.evaluate import recipe_against
    from svdq_cli.entrypoints.generate import Inputs
    from svdq_cli.evaluation.passes import passes_of_text
    from svdq_cli.evaluation.plan import plan_evaluation
    from svdq_cli.evaluation.run import evaluate as run_evaluate
    from svdq_cli.prepare.from_command_line import override, recipe_of

    left_out = passes_of_text(without or [])
    named, beside = recipe_of(against)
    how = run_options(device, overwrite, beside, resume=resume)
    recipe = recipe_against(
        checkpoint,
        override(named, of_the_model(given)),
        beyond_the_model(given),
        inputs=Inputs(image, mask, video, strength),
        options=how,
    )
    run = plan_evaluation if plan else run_evaluate
    with progress(quiet=quiet or plan, verbose=verbose, events=events) as observe:
        result = run(
            checkpoint,
            recipe,
            report_folder=report,
            without=left_out,
            backend=backend,
            options=how,
            observe=observe,
        )
    append_summary(result, summary)
    render.show(result, json=json, verbose=verbose)
    render.exit_with(result)
