"""`svdq convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import card_of, recipe_for, run_options, shared_run

if TYPE_CHECKING:
    from svdq_cli.reports import ConvertReport, PlanReport

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Recipe (.yaml, or a name that svdq recipes lists), pipeline folder, .safetensors or .gguf file, "
        "Hub id, or demo; or several recipes.",
        autocompletion=opt.recipe_names,
    ),
]
Out = Annotated[
    Path | None, typer.Option("-o", "--output", help="Where to write (default: the recipe's path).")
]
Calib = Annotated[
    Path | None, typer.Option("--calib", metavar="CALIB", help="Finished folder of svdq calibrate.")
]
Plan = Annotated[
    bool, typer.Option("--plan", help="Predict layers, bytes, time, memory and disk; convert nothing.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="GPU",
        help='With --plan: predict for a GPU, given by name ("RTX 4070") or memory (12GB).',
    ),
]


@opt.recipe_options("convert")
def convert(
    sources: Sources,
    out: Out = None,
    calib: Calib = None,
    given: opt.Given = opt.NOTHING,
    plan: Plan = False,
    gpu: Gpu = None,
    device: opt.Device = "auto",
    work: opt.Work = None,
    resume: opt.Resume = False,
    max_ram: opt.MaxRam = None,
    max_vram: opt.MaxVram = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    summary: opt.SummaryFile = None,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Convert a 16-bit model to a 4-bit checkpoint: search, quantize, pack and check."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.cli.several import (
        convert_each,
        job_names,
        named,
        refuse_second_writer,
        require_recipes,
    )
    from svdq_cli.cli.summary import append_summary
    from svdq_cli.conversion.convert import convert as run_convert
    from svdq_cli.conversion.plan import predict
    from svdq_cli.conversion.preflight import require_convertible
    from svdq_cli.conversion.workers import share_convert
    from svdq_cli.prepare.from_command_line import outputs_of, refuse_unused_prompts, rules_named
    from svdq_cli.storage.library_facts import kept_library_facts

    card = card_of(gpu, planned=plan)
    given = {**given, "outputs.path": out}
    how = run_options(device, overwrite, work=work, resume=resume, max_ram=max_ram, max_vram=max_vram)
    with (
        shared_run(how, several=len(sources) > 1) as how,
        progress(quiet=quiet or plan, verbose=verbose, events=events, team=how.team) as observe,
    ):
        if not how.team.leads:
            if not plan:
                recipe, run = recipe_for(sources[0], given, options=how)
                share_convert(recipe, calibration=calib, options=run)
            return

        jobs = job_names(sources) if len(sources) > 1 else {}
        writers: dict[Path, str] = {}  # recipes by output

        def check_one(source: str) -> None:
            recipe, run = recipe_for(source, given, options=how)
            refuse_unused_prompts(recipe, given)
            with rules_named(source):
                for path in require_convertible(recipe, run):
                    refuse_second_writer(path, source, writers)

        def convert_one(source: str) -> ConvertReport | PlanReport:
            recipe, run = recipe_for(source, given, options=how)
            refuse_unused_prompts(recipe, given)
            with rules_named(source):
                if plan:
                    for path in outputs_of(recipe) if jobs else ():
                        refuse_second_writer(path, source, writers)
                    with kept_library_facts():
                        return predict(recipe, options=run, calibration=calib, card=card)
                told = named(observe, jobs[source]) if jobs else observe
                return run_convert(recipe, outputs_of(recipe), calibration=calib, options=run, observe=told)

        if len(sources) > 1:
            require_recipes(sources, **{"-o": out, "--calib": calib, "--work": work})
            ahead = {} if plan else {"check": check_one}
            report = convert_each(sources, convert_one, observe, **ahead)
        else:
            report = convert_one(sources[0])
    append_summary(report, summary)
    render.show(report, json=json, verbose=verbose)
    render.exit_with(report)
