"""`svdq calibrate`."""

from __future__ import annotations

from dataclasses import replace

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import recipe_for, run_options, shared_run


@opt.recipe_options("calibrate")
def calibrate(
    source: opt.Source,
    out: opt.Out,
    given: opt.Given = opt.NOTHING,
    device: opt.Device = "auto",
    work: opt.Work = None,
    resume: opt.Resume = False,
    max_ram: opt.MaxRam = None,
    max_vram: opt.MaxVram = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Run prompts through the 16-bit model and keep its activation statistics, for any number of conversions."""
    from svdq_cli.cli import render
    from svdq_cli.cli.pages.conversion import after_calibration
    from svdq_cli.cli.progress import progress
    from svdq_cli.conversion.calibrate import calibrate as run_calibrate
    from svdq_cli.conversion.workers import share_calibrate
    from svdq_cli.prepare.from_command_line import rules_named

    how = run_options(device, overwrite, work=work, resume=resume, max_ram=max_ram, max_vram=max_vram)
    recipe, run = recipe_for(source, given, options=how, calibrated=True)
    with (
        shared_run(run, several=False) as run,
        progress(quiet=quiet, verbose=verbose, events=events, team=run.team) as observe,
    ):
        if not run.team.leads:
            share_calibrate(recipe, options=run)
            return
        with rules_named(source):
            report = run_calibrate(recipe, out, options=run, observe=observe)
    report = replace(report, next=after_calibration(source, recipe, report.path))
    render.show(report, json=json)
