"""Options that mean the same in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from svdq_cli.formats import NAMES
from svdq_cli.records import MAX_SEED as MAX_SEED


def _appendable(path: Path | None) -> Path | None:
    from svdq_cli.cli.summary import require_appendable

    return require_appendable(path)


def recipe_names(incomplete: str) -> list[str]:
    """For the shell: recipes by name once a letter is typed, files before that."""
    from svdq_cli.recipe.shipped import names_like

    return list(names_like(incomplete)) if incomplete else []


def _words(*words: str) -> Callable[[str], list[str]]:
    """The shell completes an option's value to one of these."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


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
    str,
    typer.Option(
        metavar="cpu|cuda|cuda:N",
        help="Where to compute (default: auto, the GPU where there is one).",
        show_default=False,
        autocompletion=_words("auto", "cpu", "cuda"),
    ),
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
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", help="Seed of calibration and search (default: the recipe's, else 0)."),
]
ImageSeed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Seed of the images' start noise.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="int4|nvfp4",
        help="4-bit number format (default: int4).",
        autocompletion=_words("int4", "nvfp4"),
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Rank of the 16-bit branch: a multiple of 16, or searched for each layer (default: 32).",
    ),
]
Effort = Annotated[
    str | None,
    typer.Option(
        metavar="datafree|fast|balanced|best",
        help="How hard to search; fast is the paper's search (default: balanced).",
        autocompletion=_words("datafree", "fast", "balanced", "best"),
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="|".join(NAMES),
        help="Output format, repeatable (default: nunchaku-lite, a diffusers folder).",
        autocompletion=_words(*NAMES),
    ),
]
Family = Annotated[str | None, typer.Option(help="Model family, where svdq can't tell.")]
Base = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|HUB_ID", help="Pipeline with the parts that a single file lacks."),
]
Denoiser = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Of a pipeline with several denoisers (Wan 2.2), the one to convert; or the one that a file holds.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="LoRA to merge into the model first. Repeatable."),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FOLDER|NAME",
        help="Prompts: .txt (one a line), .csv, .tsv, .json, .jsonl, .parquet or .tar (webdataset), a folder of "
        "captions next to images, or MJHQ-30K, sDCI or PartiPrompts from the hub.",
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
Samples = Annotated[
    int | None, typer.Option(metavar="N", help="How many of the prompts to use (default: 64; in eval 16).")
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Denoising steps for each image (default: the model's own).")
]
Width = Annotated[int | None, typer.Option(metavar="PIXELS", help="Image width (default: the model's own).")]
Height = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="Image height (default: the model's own).")
]
BatchSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="Images generated at once (default: 1; more for small models)."),
]
Image = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Image to start from, to edit or to fill in.",
    ),
]
Mask = Annotated[
    Path | None, typer.Option(metavar="FILE", help="What of --image is made anew: white. For inpainting.")
]
Strength = Annotated[
    float | None,
    typer.Option(metavar="X", help="How much of --image is made anew, above 0 and at most 1."),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar='"FIGURE<X"',
        help="Exit with 6 if this holds, such as psnr_db<20 or speed_ratio.min<1. Repeatable.",
    ),
]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Recipe (.yaml, or a name that svdq recipes lists), pipeline folder, .safetensors or .gguf file, hub id, "
        "or demo.",
        autocompletion=recipe_names,
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A folder or file that svdq convert wrote.")]
