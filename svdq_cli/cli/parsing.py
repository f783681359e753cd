"""From a command's words to a recipe and run options. Heavy imports are inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.recipe import Recipe
    from svdq_cli.system.graphics_cards import Card


def run_options(
    device: str,
    overwrite: bool,
    beside: Path | None = None,
    *,
    work: Path | None = None,
    resume: bool = False,
    max_ram: str | None = None,
    max_vram: str | None = None,
) -> RunOptions:
    from svdq_cli.prepare.options import RunOptions

    return RunOptions(
        device=device,
        overwrite=overwrite,
        beside=beside,
        work=work,
        resume=resume,
        max_ram=_size("--max-ram", max_ram),
        max_vram=_size("--max-vram", max_vram),
    )


def card_of(gpu: str | None, *, planned: bool) -> Card | None:
    """The card that --gpu names. It is for predictions: conversions run on the device that --device names."""
    from svdq_cli.errors import UsageError
    from svdq_cli.system.graphics_cards import card_named

    if gpu is None:
        return None
    if not planned:
        raise UsageError(
            "--gpu names a GPU to predict for",
            hint="add --plan; --device chooses where to convert",
            where="--gpu",
        )
    return card_named(gpu)


def _size(option: str, text: str | None) -> int | None:
    from svdq_cli.errors import UsageError
    from svdq_cli.recipe import SIZE_HINT, bytes_of_size

    size = None if text is None else bytes_of_size(text)
    if text is not None and size is None:
        raise UsageError(f"{option} {text}: not a size", hint=SIZE_HINT, where=option)
    return size


@contextmanager
def shared_run(options: RunOptions, *, several: bool) -> Iterator[RunOptions]:
    """The options of this process among those that a launcher (torchrun) started: its team, and a GPU of its own.

    `several`: whether more than one recipe is given; these are converted by one process.
    """
    from dataclasses import replace

    from svdq_cli.errors import UsageError
    from svdq_cli.system.distributed import joined, launched, local_rank

    if several and launched():
        raise UsageError(
            "several processes convert one model at a time, but several recipes are given",
            hint="start the processes once for each recipe",
        )
    with joined() as team:
        own_gpu = launched() and options.device in ("auto", "cuda") and _has_gpu()
        device = f"cuda:{local_rank()}" if own_gpu else options.device
        yield replace(options, team=team, device=device)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def recipe_for(
    source: str, given: Mapping[str, object], *, options: RunOptions, calibrated: bool = False
) -> tuple[Recipe, RunOptions]:
    """The recipe a SOURCE means, with what was typed put over it, and where its relative paths start. `calibrated`: it
    calibrates even where the recipe itself says nothing of that."""
    from dataclasses import replace

    from svdq_cli.prepare.from_command_line import override, recipe_of, with_default_calibration

    recipe, beside = recipe_of(source)
    if calibrated:
        recipe = with_default_calibration(recipe)
    return override(recipe, given), replace(options, beside=beside)


def of_the_model(given: Mapping[str, object]) -> dict[str, object]:
    """What was typed of the model: its base, its LoRAs."""
    return {key: value for key, value in given.items() if key.startswith("model.")}


def beyond_the_model(given: Mapping[str, object]) -> dict[str, object]:
    """What was typed of anything else."""
    return {key: value for key, value in given.items() if not key.startswith("model.")}


def base_of(given: Mapping[str, object]) -> Path | None:
    """The pipeline that --base names, on this machine."""
    from svdq_cli.prepare.locate import locate_base

    base = given.get("model.base")
    return None if base is None else locate_base(str(base))
