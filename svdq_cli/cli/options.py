"""Options that mean the same in every command.

Those that set keys of the recipe are first, each once: type, flag, help, heading, the keys that it sets and the
commands that it is `on`. A command takes all of its own through `recipe_options`.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

import typer

from svdq_cli.formats import NAMES


def with_home_expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, whose paths may begin with `~`: a shell leaves that in `--option=~/file`, and a CI job in every
    word."""

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        return command(
            **{name: _expanded(value) if isinstance(value, Path) else value for name, value in values.items()}
        )

    return run


def _expanded(path: Path) -> Path:
    return Path(os.path.expanduser(path))


def _appendable(path: Path | None) -> Path | None:
    from svdq_cli.cli.summary import require_appendable

    return require_appendable(path and _expanded(path))


def recipe_names(incomplete: str) -> list[str]:
    """Shell completion of SOURCE: recipes by name once a letter is typed, files before that."""
    from svdq_cli.recipe.shipped import names_like

    return list(names_like(incomplete)) if incomplete else []


def _words(*words: str) -> Callable[[str], list[str]]:
    """The shell completes an option's value to one of these."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


@dataclass(frozen=True, slots=True)
class Sets:
    """The keys of the recipe that an option sets, and the commands that have it. `read`: from the typed value to the
    recipe's."""

    keys: tuple[str, ...]
    on: tuple[str, ...]
    read: Callable[[Any], object]


def sets(*keys: str, on: str, read: Callable[[Any], object] = lambda value: value) -> Sets:
    """`on`: names of commands, with spaces between them."""
    return Sets(keys, tuple(on.split()), read)


def _whole_number_or_word(text: str) -> int | str:
    """`--rank 32` or `--rank auto`; anything else is for the recipe's own check to refuse."""
    return int(text) if text.isdecimal() else text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


# ------------------------------------------------------------------------------------- what sets keys of the recipe

Precision = Annotated[
    str | None,
    typer.Option(
        metavar="int4|nvfp4",
        help="4-bit number format (default: int4).",
        autocompletion=_words("int4", "nvfp4"),
        rich_help_panel="Quantization",
    ),
    sets("quantization.precision", on="convert init inspect"),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Rank of the 16-bit branch: a multiple of 16, or searched for each layer (default: 32).",
        rich_help_panel="Quantization",
    ),
    sets("quantization.rank", on="convert init inspect", read=_whole_number_or_word),
]
Effort = Annotated[
    str | None,
    typer.Option(
        metavar="datafree|fast|balanced|best",
        help="Search effort; fast is the paper's search, branch and codes fitted to each other (default: balanced).",
        autocompletion=_words("datafree", "fast", "balanced", "best"),
        rich_help_panel="Quantization",
    ),
    sets("quantization.effort", on="convert init"),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="|".join(NAMES),
        help="Output format, repeatable (default: nunchaku-lite, a diffusers folder).",
        autocompletion=_words(*NAMES),
        rich_help_panel="Output",
    ),
    sets("outputs.format", on="convert inspect"),
]
Components = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Text encoders of the pipeline to store with 4-bit weights too: text_encoder,text_encoder_2.",
        rich_help_panel="Quantization",
    ),
    sets("components", on="convert init inspect", read=_names),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FOLDER|NAME",
        help="Prompts: .txt (one per line), .csv, .tsv, .json, .jsonl, .parquet or .tar (webdataset), a folder of "
        "captions next to images, or MJHQ-30K, sDCI or PartiPrompts from the Hub.",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.prompts", on="convert calibrate eval"),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(
        "--prompt-column",
        metavar="NAME",
        help="Column that holds the prompts, if it is not named prompt, caption or text; "
        "--prompts may then be any data set on the Hub.",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.prompts.column", on="convert calibrate eval"),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Number of prompts to use (default: the model's own, else 64; in eval 16).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.samples", on="convert calibrate eval"),
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Denoising steps for each image (default: the model's own).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.steps", on="convert calibrate eval generate"),
]
Width = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Image width (default: the model's own).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.width", on="convert calibrate eval"),
]
Height = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Image height (default: the model's own).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.height", on="convert calibrate eval"),
]
Frames = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Frames of a video (default: as calibrated, else the model's own).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.frames", on="convert calibrate eval generate"),
]
Fps = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="Frames per second of a video (default: the model's own).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.fps", on="convert calibrate eval generate"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Number of images generated at once (default: 1; more for small models).",
        rich_help_panel="Prompts and sampling",
    ),
    sets("calibration.batch_size", on="convert calibrate eval"),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Seed of calibration and search (default: the recipe's, else 0).",
        rich_help_panel="Run",
    ),
    sets("calibration.seed", "quantization.seed", on="convert calibrate"),
]
ImageSeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Seed of the images' start noise.", rich_help_panel="Run"),
    sets("calibration.seed", "quantization.seed", on="eval generate"),
]
Family = Annotated[
    str | None,
    typer.Option(help="Model family, if svdq can't detect it.", rich_help_panel="Model"),
    sets("model.family", on="convert calibrate init inspect"),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|HUB_ID",
        help="Pipeline that supplies the parts a single file lacks.",
        rich_help_panel="Model",
    ),
    sets("model.base", on="convert calibrate init inspect check eval generate export"),
]
Denoiser = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which denoiser to convert, in a pipeline with several (Wan 2.2); or which one a file holds.",
        rich_help_panel="Model",
    ),
    sets("model.denoiser", on="convert calibrate init inspect"),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT][:COMPONENT]",
        help="LoRA to merge into the 16-bit model first; svdq generate runs it beside the 4-bit layers. COMPONENT is "
        "one of several denoisers, such as transformer_2. Repeatable.",
        rich_help_panel="Model",
    ),
    sets("model.loras", on="convert calibrate init inspect check eval generate"),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar='"METRIC<X"',
        help="Exit with code 6 if this is true, such as psnr_db<20 or speed_ratio.min<1. Repeatable.",
        rich_help_panel="Reporting",
    ),
    sets("gates", on="convert eval"),
]

# ------------------------------------------------------------------------------------- of the command line alone

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
SummaryFile = Annotated[
    Path | None,
    typer.Option(
        "--summary",
        metavar="FILE.md",
        help="Append the result to this file as Markdown.",
        callback=_appendable,
    ),
]
EventsFile = Annotated[
    Path | None,
    typer.Option("--events", metavar="FILE.jsonl", help="Write progress to this file as JSON lines."),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show more detail: every layer.")]
Backend = Annotated[
    str,
    typer.Option(
        metavar="auto|kernels|kernels:MODE|cpu|reference",
        help="Backend that computes the 4-bit layers. MODE, on Hopper: exact, w4a8, fp8.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="cpu|cuda|cuda:N",
        help="Device to compute on (default: auto, the GPU if there is one).",
        show_default=False,
        autocompletion=_words("auto", "cpu", "cuda"),
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for unfinished work (default: hidden, next to the output)."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume unfinished work, if there is any.")]
MaxRam = Annotated[str | None, typer.Option("--max-ram", metavar="SIZE", help="RAM limit, such as 16GiB.")]
MaxVram = Annotated[
    str | None, typer.Option("--max-vram", metavar="SIZE", help="GPU memory limit, such as 22GiB.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Image = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Image to start from, to edit or to fill in.",
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Mask for inpainting: the white area of --image is generated again."),
]
Video = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Video to start from, or whose motion is taken."),
]
Strength = Annotated[
    float | None,
    typer.Option(metavar="X", help="How much --image is changed, above 0 and at most 1."),
]
Out = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Recipe (.yaml, or a name that svdq recipes lists), pipeline folder, .safetensors or .gguf file, Hub id, "
        "or demo.",
        autocompletion=recipe_names,
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A folder or file that svdq convert wrote.")]

# ------------------------------------------------------------------------------------- the table's reader

Given = Mapping[str, object]  # what was typed, by the recipe's keys
NOTHING: Given = MappingProxyType({})


def recipe_options_on(command: str) -> dict[str, tuple[object, Sets]]:
    """The options of a command that set keys of the recipe, in order: by parameter the annotation, and what it sets."""
    found: dict[str, tuple[object, Sets]] = {}
    for name, option in globals().items():
        for setting in get_args(option)[1:]:
            if isinstance(setting, Sets) and command in setting.on:
                found[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()] = option, setting
    return found


def recipe_options(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts the options that are `on` a command in the place of its parameter `given`, for typer to read; the
    function is called with what was typed of them, by the recipe's keys, as `given`."""
    options = recipe_options_on(command)

    def decorated(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**typed: object) -> None:
            given: dict[str, object] = {}
            for name, (_, setting) in options.items():
                value = typed.pop(name)
                if value is not None and value != []:
                    given |= {key: setting.read(value) for key in setting.keys}
            function(**typed, given=given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
                continue
            parameters += (
                inspect.Parameter(name, parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                for name, (annotation, _) in options.items()
            )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorated
