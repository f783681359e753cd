"""The commands. Each parses, calls one library function and renders its report; heavy imports are inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdq_cli.cli import options as opt

if TYPE_CHECKING:
    from svdq_cli.preparing import RunOptions
    from svdq_cli.recipe import Recipe

app = typer.Typer(
    name="svdq",
    help="Convert diffusion models to 4-bit SVDQuant checkpoints: weights and activations in 4 bits, "
    "outliers in a 16-bit low-rank branch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Recipe (.yaml), pipeline folder, .safetensors or .gguf file, hub id, or demo."
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A folder or file that svdq convert wrote.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from svdq_cli import __version__

        print(f"svdq {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: opt.Out = Path("svdq-demo"),
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Only write the embedded model there, as a diffusers folder."),
    ] = None,
    outliers: Annotated[
        bool,
        typer.Option("--outliers", help="Only the stress variant, whose activations have strong outliers."),
    ] = False,
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Run the whole job on the embedded model: calibrate, convert, check, evaluate; ends with pictures and a table."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress

    if export is not None:
        from svdq_cli.showcase import export_model

        render.show(export_model(export, outliers=outliers, overwrite=overwrite), json=json)
        return
    from svdq_cli.locate import DEMO_SOURCES
    from svdq_cli.showcase import demo as run_demo

    sources = ("demo:outliers",) if outliers else DEMO_SOURCES
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_demo(out, sources=sources, options=_options(device, overwrite), observe=observe)
    render.show(report, json=json)


@app.command()
def init(
    source: Source,
    out: opt.Out,
    precision: opt.Precision = None,
    rank: opt.Rank = None,
    effort: opt.Effort = None,
    family: opt.Family = None,
    base: opt.Base = None,
    loras: opt.Loras = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
) -> None:
    """Write a complete, commented recipe for a model."""
    from svdq_cli.cli import render
    from svdq_cli.starting import write_recipe

    report = write_recipe(
        source,
        out,
        overwrite=overwrite,
        precision=precision,
        rank=_rank(rank),
        effort=effort,
        family=family,
        base=base,
        loras=loras,
    )
    render.show(report, json=json)


@app.command()
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="SOURCE|CKPT", help="A 16-bit model or a converted checkpoint.")
    ],
    precision: opt.Precision = None,
    rank: opt.Rank = None,
    formats: opt.Formats = None,
    family: opt.Family = None,
    base: opt.Base = None,
    loras: opt.Loras = None,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show family, layers and sizes; of a checkpoint also format, precision, rank and provenance."""
    from svdq_cli.checkpoint import looks_like_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.pipeline import inspect_checkpoint, inspect_source

    if looks_like_checkpoint(Path(target)):
        report = inspect_checkpoint(Path(target))
    else:
        recipe, run = _recipe(
            target,
            precision=precision,
            rank=_rank(rank),
            family=family,
            base=base,
            loras=loras,
            formats=formats,
            options=_options("cpu", False),
        )
        report = inspect_source(recipe, options=run)
    render.show(report, json=json, verbose=verbose)


@app.command()
def calibrate(
    source: Source,
    out: opt.Out,
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
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Draw prompts with the 16-bit model and keep its activation statistics, for any number of conversions."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.pipeline import calibrate as run_calibrate
    from svdq_cli.starting import with_default_calibration

    recipe, run = _recipe(source, options=_options(device, overwrite), family=family, base=base, loras=loras)
    recipe = _override(
        with_default_calibration(recipe),
        prompts=prompts,
        samples=samples,
        steps=steps,
        width=width,
        height=height,
        batch_size=batch_size,
        seed=seed,
    )
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_calibrate(recipe, out, options=run, observe=observe)
    render.show(report, json=json)


@app.command()
def convert(
    source: Source,
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

    recipe, run = _recipe(
        source,
        options=_options(device, overwrite),
        precision=precision,
        rank=_rank(rank),
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


@app.command()
def export(
    checkpoint: Checkpoint,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format to pack for.")],
    out: opt.Out,
    base: opt.Base = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Pack a checkpoint for another runtime without quantizing again: exactly, or not at all."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.exporting import export as run_export
    from svdq_cli.locate import locate_base

    pipeline = locate_base(base) if base else None
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_export(
            checkpoint, to, out, base=pipeline, options=_options("cpu", overwrite), observe=observe
        )
    render.show(report, json=json)


@app.command()
def check(
    checkpoint: Checkpoint,
    against: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The 16-bit model it was made from.")
    ] = None,
    base: opt.Base = None,
    loras: opt.Loras = None,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check structure, finite values and, against the source, the reconstruction of every layer."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.pipeline import check as run_check
    from svdq_cli.preparing import source_of

    recipe_and_options = (
        _recipe(against, options=_options("cpu", False), base=base, loras=loras) if against else None
    )
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        source = source_of(*recipe_and_options) if recipe_and_options else None
        report = run_check(checkpoint, against=source, observe=observe)
    render.show(report, json=json, verbose=verbose)
    render.exit_on_problems(report, json=json)


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint,
    against: Annotated[str, typer.Option(metavar="SOURCE", help="The 16-bit model to compare with.")],
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Keep pictures, grid, figures and plots there."),
    ] = None,
    base: opt.Base = None,
    loras: opt.Loras = None,
    prompts: opt.Prompts = None,
    samples: opt.Samples = None,
    steps: opt.Steps = None,
    width: opt.Width = None,
    height: opt.Height = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    fail_if: opt.FailIf = None,
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Draw with both models at equal seeds: PSNR, SSIM, per-layer SQNR, and naive 4-bit beside them."""
    from svdq_cli.checkpoint import open_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.drawing import evaluate as run_evaluate
    from svdq_cli.drawing import evaluation_recipe
    from svdq_cli.starting import recipe_of

    named, beside = recipe_of(against)
    model = _override(named, base=base, loras=loras).model
    recipe = _override(
        evaluation_recipe(open_checkpoint(checkpoint), model.source).model_copy(update={"model": model}),
        prompts=prompts,
        samples=samples,
        steps=steps,
        width=width,
        height=height,
        batch_size=batch_size,
        seed=seed,
        fail_if=fail_if,
    )
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        result = run_evaluate(
            checkpoint,
            recipe,
            report_folder=report,
            options=_options(device, overwrite, beside),
            observe=observe,
        )
    render.show(result, json=json, verbose=verbose)
    render.exit_on_missed_gates(result.gates_missed, json=json)


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: opt.Out,
    steps: opt.Steps = None,
    width: opt.Width = None,
    height: opt.Height = None,
    seed: opt.Seed = None,
    base: opt.Base = None,
    backend: Annotated[
        str, typer.Option(metavar="auto|kernels|reference", help="What computes the 4-bit layers.")
    ] = "auto",
    device: opt.Device = "auto",
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Draw one picture with a converted checkpoint."""
    from svdq_cli.checkpoint import open_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.drawing import evaluation_recipe
    from svdq_cli.drawing import generate as run_generate
    from svdq_cli.locate import locate_base

    recipe = _override(
        evaluation_recipe(open_checkpoint(checkpoint), str(checkpoint)),
        steps=steps,
        width=width,
        height=height,
        seed=0 if seed is None else seed,
    )
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = run_generate(
            checkpoint,
            prompt,
            out,
            recipe=recipe,
            backend=backend,
            base=locate_base(base) if base else None,
            options=_options(device, overwrite),
            observe=observe,
        )
    render.show(report, json=json)


@app.command()
def bench(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="Measure its layers (else: random layers of known shapes)."),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="demo|flux1-dev|sdxl|pixart-sigma",
            help="Which shapes (else: flux1-dev on a GPU, demo on a CPU).",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="int4|nvfp4", help="4-bit number format (else: both).")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Rank of the 16-bit branch, a multiple of 16 (else: 16).")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--m", metavar="N", help="Tokens at once in W4A4 layers.")
    ] = None,
    step: Annotated[
        bool, typer.Option(help="Also a whole step of a FLUX.1-shaped transformer (GPU only).")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the rows as bars.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure each row.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of random layers and inputs.")] = 0,
    device: opt.Device = "auto",
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure speed and arithmetic error of linear layers, beside torch's own in the same run."""
    from svdq_cli.bench.plot import draw_plot
    from svdq_cli.bench.run import (
        RANK,
        BenchSettings,
        bench_layers,
        bench_shapes,
        precisions_named,
        refuse_given,
        with_steps,
    )
    from svdq_cli.bench.shapes import default_shapes, shape_set
    from svdq_cli.checkpoint import open_checkpoint
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.machine import resolve_device

    settings = BenchSettings(resolve_device(device), rows, seconds, seed)
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        if checkpoint is not None:
            refuse_given(shapes=shapes, precision=precision, rank=rank)
            opened = open_checkpoint(checkpoint)
            report = bench_layers(opened.layers, opened.solution, settings=settings, observe=observe)
        else:
            report = bench_shapes(
                shape_set(shapes) if shapes else default_shapes(settings.device),
                precisions=precisions_named(precision),
                rank=RANK if rank is None else rank,
                settings=settings,
                observe=observe,
            )
        if step:
            report = with_steps(report, precisions_named(precision), settings=settings)
    if plot is not None:
        draw_plot(report, plot)
    render.show(report, json=json, verbose=verbose)


@app.command()
def doctor(json: opt.Json = False) -> None:
    """Show versions, GPU and backends, each with a one-second self-test."""
    from svdq_cli.cli import render
    from svdq_cli.diagnosis import diagnose

    report = diagnose()
    render.show(report, json=json)
    if report.status != "ok":
        raise typer.Exit(4)


# ------------------------------------------------------------------------------------------------- shared parsing


def _options(device: str, overwrite: bool, beside: Path | None = None) -> RunOptions:
    from svdq_cli.preparing import RunOptions

    return RunOptions(device=device, overwrite=overwrite, beside=beside)


def _recipe(source: str, *, options: RunOptions, **given: object) -> tuple[Recipe, RunOptions]:
    """The recipe a SOURCE means, with the command's options put over it, and where its relative paths start."""
    from dataclasses import replace

    from svdq_cli.starting import recipe_of

    recipe, beside = recipe_of(source)
    return _override(recipe, **given), replace(options, beside=beside)


def _override(recipe: Recipe, **given: object) -> Recipe:
    from svdq_cli.starting import override

    return override(recipe, given)


def _rank(text: str | None) -> int | str | None:
    """`--rank 32` or `--rank auto`; anything else is for the recipe's own check to refuse."""
    return int(text) if text is not None and text.isdecimal() else text
