"""Options that mean the same in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdq_cli.records import MAX_SEED as MAX_SEED


def _appendable(path: Path | None) -> Path | None:
    from svdq_cli.cli.summary import require_appendable

    return require_appendable(path)


Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
SummaryFile = Annotated[
    Path | None,
    typer.Option(
        "--summary",
        metavar="FILE.md",
        help="Append the result to this file, as Markdown.",
        callback=_appendable,
    ),
]
EventsFile = Annotated[
    Path | None, typer.Option("--events", metavar="FILE.jsonl", help="Progress as JSON lines into this file.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More detail: every layer.")]
Device = Annotated[
    str, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to compute. auto: the GPU where there is one.")
]
Work = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where unfinished work is kept (else: hidden, beside the output)."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with unfinished work; start where there is none.")
]
MaxRam = Annotated[
    str | None, typer.Option("--max-ram", metavar="SIZE", help="Memory to plan with, as 16GiB.")
]
MaxVram = Annotated[
    str | None, typer.Option("--max-vram", metavar="SIZE", help="GPU memory it may take, as 22GiB.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Seed = Annotated[int | None, typer.Option(help="Seed of calibration, search and pictures.")]
Precision = Annotated[str | None, typer.Option(metavar="int4|nvfp4", help="4-bit number format.")]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto", help="Rank of the 16-bit branch: a multiple of 16, or searched for each layer."
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        metavar="datafree|fast|balanced|best", help="How hard to search (fast: the paper's search)."
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format", metavar="nunchaku-lite|nunchaku|comfy|vllm-omni", help="Output format. Repeatable."
    ),
]
Family = Annotated[str | None, typer.Option(help="Model family, where svdq can't tell.")]
Base = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|HUB_ID", help="Pipeline with the parts that a single file lacks."),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="LoRA to merge into the model first. Repeatable."),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FOLDER|NAME",
        help="Prompts: .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet, a folder of captions next to images, "
        "or MJHQ-30K, sDCI or PartiPrompts from the hub.",
    ),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(
        "--prompt-column",
        metavar="NAME",
        help="Column that holds the prompts, where it is not called prompt, caption or text; "
        "--prompts may then be any data set on the hub.",
    ),
]
Samples = Annotated[int | None, typer.Option(help="How many of the prompts to draw.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps for each picture.")]
Width = Annotated[int | None, typer.Option(help="Picture width in pixels.")]
Height = Annotated[int | None, typer.Option(help="Picture height in pixels.")]
BatchSize = Annotated[int | None, typer.Option(help="Pictures drawn at once.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option("--fail-if", metavar='"psnr_db<20"', help="Exit with 6 if this holds. Repeatable."),
]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Recipe (.yaml), pipeline folder, .safetensors or .gguf file, hub id, or demo."
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A folder or file that svdq convert wrote.")]
