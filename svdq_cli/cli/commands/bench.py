"""`svdq bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdq_cli.cli import options as opt

if TYPE_CHECKING:
    from svdq_cli.bench.cases import BenchSettings
    from svdq_cli.bench.report import BenchReport
    from svdq_cli.records import Observer

Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="CKPT",
        help="Checkpoint whose layers to measure (default: random layers of known shapes).",
    ),
]
Shapes = Annotated[
    str | None,
    typer.Option(
        metavar="demo|flux1-dev|sdxl|pixart-sigma",
        help="Layer shapes to measure (default: flux1-dev on a GPU, demo on a CPU).",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="int4|nvfp4", help="4-bit number format (default: both).", rich_help_panel="Quantization"
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Rank of the 16-bit branch, a multiple of 16 (default: 16).",
        rich_help_panel="Quantization",
    ),
]
Rows = Annotated[int | None, typer.Option("--m", metavar="N", help="Number of tokens in W4A4 layers.")]
Step = Annotated[
    bool,
    typer.Option(help="Also measure a step of a FLUX.1-shaped transformer; on a CPU, of two of its blocks."),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot the rows as bars into this file.")]
Seconds = Annotated[float, typer.Option(help="Seconds to measure each row.")]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Seed of the random layers and inputs.",
        rich_help_panel="Run",
    ),
]


def bench(
    checkpoint: Checkpoint = None,
    shapes: Shapes = None,
    precision: Precision = None,
    rank: Rank = None,
    rows: Rows = None,
    step: Step = False,
    plot: Plot = None,
    seconds: Seconds = 0.2,
    seed: Seed = 0,
    fail_if: opt.FailIf = None,
    device: opt.Device = "auto",
    json: opt.Json = False,
    summary: opt.SummaryFile = None,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure speed and arithmetic error of linear layers, against torch's own in the same run."""
    from svdq_cli.bench.cases import BenchSettings
    from svdq_cli.bench.gates import judged
    from svdq_cli.bench.plot import draw_plot
    from svdq_cli.bench.run import RANK, bench_shapes, precisions_named, refuse_given, with_steps
    from svdq_cli.bench.shapes import default_shapes, shape_set
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.cli.summary import append_summary
    from svdq_cli.recipe import parse_fail_if
    from svdq_cli.storage.atomic import disk_errors
    from svdq_cli.storage.output_paths import require_image_place
    from svdq_cli.system.machine import resolve_device

    _require_seed(seed)
    if plot is not None:
        require_image_place(plot, overwrite=True)
    gates = [parse_fail_if(condition) for condition in fail_if or []]
    settings = BenchSettings(resolve_device(device), rows, seconds, seed)
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        if checkpoint is not None:
            refuse_given(shapes=shapes, precision=precision, rank=rank)
            report = _bench_checkpoint(checkpoint, settings, observe)
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
    report = judged(report, gates)
    append_summary(report, summary)
    render.show(report, json=json, verbose=verbose)
    if plot is not None:  # last: what was measured is not lost with a plot that the disk refuses
        with render.after_report(), disk_errors(plot, option="--plot"):
            draw_plot(report, plot)
    render.exit_with(report)


def _require_seed(seed: int) -> None:
    """Here and not by the option's range, which its help would show with twenty digits."""
    from svdq_cli.errors import UsageError
    from svdq_cli.records import MAX_SEED

    if not 0 <= seed <= MAX_SEED:
        raise UsageError(
            f"--seed {seed} is out of range", hint=f"give a seed of 0 to {MAX_SEED}", where="--seed"
        )


def _bench_checkpoint(path: Path, settings: BenchSettings, observe: Observer) -> BenchReport:
    """The checkpoint's own layers, measured."""
    from svdq_cli.bench.run import bench_layers
    from svdq_cli.checkpoint.reader import NEEDS_METADATA, open_checkpoint

    opened = open_checkpoint(path, hint=NEEDS_METADATA)
    return bench_layers(opened.layers, opened.solution, settings=settings, observe=observe)
