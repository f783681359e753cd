"""`svdq lora`."""

from __future__ import annotations

from typing import Annotated

import typer

from svdq_cli.cli import options as opt
from svdq_cli.cli.parsing import run_options

Loras = Annotated[
    list[str],
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT][:COMPONENT]",
        help="LoRA to fold in; COMPONENT is one of several denoisers, such as transformer_2. Repeatable.",
    ),
]
MaxRank = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Compress each branch to rank N by SVD; the report has every layer's error."
    ),
]
ApproximateRank = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Rank to which DoRA, full differences, and LoHa or LoKr of a higher rank are reduced.",
    ),
]
SkipW4a16 = Annotated[
    bool,
    typer.Option("--skip-w4a16", help="Leave modulation layers unchanged, even where a LoRA changes them."),
]
To = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="nunchaku", help="Write a LoRA file for Nunchaku's FLUX.1 engine instead."
    ),
]


def lora(
    checkpoint: opt.Checkpoint,
    loras: Loras,
    out: opt.Out,
    max_rank: MaxRank = None,
    approximate_rank: ApproximateRank = 64,
    skip_w4a16: SkipW4a16 = False,
    to: To = None,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    events: opt.EventsFile = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Fold LoRAs into the low-rank branch of a checkpoint, without quantizing again."""
    from svdq_cli.cli import render
    from svdq_cli.cli.progress import progress
    from svdq_cli.errors import UsageError
    from svdq_cli.lora.fold import FoldSettings, fold
    from svdq_cli.lora.standalone import write_nunchaku_lora
    from svdq_cli.prepare.from_command_line import files_of_loras, parse_lora

    settings = FoldSettings(max_rank, approximate_rank, skip_w4a16)
    if to not in (None, "nunchaku"):
        raise UsageError(
            f"--format {to}: LoRA files are written for nunchaku only",
            hint="leave --format out: the folded checkpoint keeps its format; svdq export changes it",
        )
    files = files_of_loras([parse_lora(text) for text in loras])
    if to is not None:
        options = run_options("cpu", overwrite)
        written = write_nunchaku_lora(checkpoint, files, out, settings=settings, options=options)
        render.show(written, json=json, verbose=verbose)
        return
    with progress(quiet=quiet, verbose=verbose, events=events) as observe:
        report = fold(
            checkpoint,
            files,
            out,
            settings=settings,
            options=run_options("cpu", overwrite),
            observe=observe,
        )
    render.show(report, json=json, verbose=verbose)
