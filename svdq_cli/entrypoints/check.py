"""`svdq check --against`: a checkpoint next to the 16-bit model that it was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.origin import origin_of
from svdq_cli.prepare.sources import pipeline_of, without_same_base
from svdq_cli.recipe import Recipe
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.reports import CheckReport


def check_against(
    path: Path, recipe: Recipe, *, options: RunOptions = DEFAULT_OPTIONS, observe: Observer = ignore_events
) -> CheckReport:
    """`check` against the recipe's model, with the LoRAs that the checkpoint says it holds.

    Raises InputError (kind "wrong-source") for another model than the one that the checkpoint was made from.
    """
    recipe = without_same_base(recipe, options)
    checkpoint = open_checkpoint(path, base=pipeline_of(recipe, options))
    origin = origin_of(checkpoint, recipe, options)
    report = check(path, against=origin.require_same(), observe=observe)
    for note in origin.notes:
        observe(Event("warning", "check", detail=note))
    return replace(
        report, same_source=origin.same, loras=origin.loras, warnings=(*origin.notes, *report.warnings)
    )
