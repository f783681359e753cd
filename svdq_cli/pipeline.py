"""The pipeline in verbs: plan, inspect, calibrate, convert, check.

Each takes a recipe or a path and returns a report record. Nothing here prints; progress goes to `observe`. The three
long ones have modules of their own; the verbs that draw pictures to judge or to keep (evaluate, generate) are in
`drawing.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from svdq_cli.checking import check
from svdq_cli.checkpoint import open_checkpoint
from svdq_cli.conversion.calibrating import calibrate
from svdq_cli.conversion.plan_report import predict
from svdq_cli.conversion.run import convert
from svdq_cli.origin import origin_of
from svdq_cli.preparing import (
    DEFAULT_OPTIONS,
    RunOptions,
    inspect_layer,
    pipeline_of,
    predicted_sizes,
    prepare,
    sizes_of,
)
from svdq_cli.recipe import Recipe
from svdq_cli.records import CheckReport, Event, InspectReport, Observer, ignore_events

__all__ = [
    "calibrate",
    "check",
    "check_against",
    "convert",
    "inspect_checkpoint",
    "inspect_source",
    "predict",
]


def check_against(
    path: Path, recipe: Recipe, *, options: RunOptions = DEFAULT_OPTIONS, observe: Observer = ignore_events
) -> CheckReport:
    """`check` against the recipe's model, with the LoRAs that the checkpoint says it holds.

    Raises InputError (kind "wrong-source") for another model than the one that the checkpoint was made from.
    """
    checkpoint = open_checkpoint(path, base=pipeline_of(recipe, options))
    origin = origin_of(checkpoint, recipe, options)
    report = check(path, against=origin.require_same(), observe=observe)
    for note in origin.notes:
        observe(Event("warning", "check", detail=note))
    return replace(report, same_source=origin.same, loras=origin.loras, warnings=origin.notes)


def inspect_source(recipe: Recipe, *, options: RunOptions = DEFAULT_OPTIONS) -> InspectReport:
    """What becomes of each layer of a 16-bit model."""
    prepared = prepare(recipe, beside=options.beside)
    planned = {layer.name: layer for layer in prepared.plan.layers}
    input_of = {name: shared.name for shared in prepared.plan.inputs for name in shared.layers}
    return InspectReport(
        kind="source",
        family=prepared.plan.family,
        model_class=prepared.plan.model_class,
        format=prepared.targets[0].format.name,
        precision=recipe.quantization.precision,
        rank=int(recipe.quantization.rank),
        parameters=prepared.plan.parameters,
        layers=tuple(
            inspect_layer(linear, planned.get(linear.name), input_of) for linear in prepared.inventory.linears
        ),
        bytes=predicted_sizes(prepared),
        provenance=None,
        read_as=prepared.source.kind,
        warnings=prepared.source.warnings,
    )


def inspect_checkpoint(path: Path, *, base: Path | None = None) -> InspectReport:
    """What a converted checkpoint holds, from its headers. `base`: see `open_checkpoint`."""
    checkpoint = open_checkpoint(path, base=base)
    planned = {layer.name: layer for layer in checkpoint.layers}
    linears = [plan.linear for plan in checkpoint.layers] + list(checkpoint.kept)
    return InspectReport(
        kind="checkpoint",
        family=checkpoint.family,
        model_class=checkpoint.model_class,
        format=checkpoint.format.name,
        precision=checkpoint.precision.name if checkpoint.precision else None,
        rank=checkpoint.rank,
        parameters=checkpoint.parameters,
        layers=tuple(inspect_layer(linear, planned.get(linear.name)) for linear in linears),
        bytes=sizes_of(checkpoint.state, checkpoint.source.bytes),
        provenance=checkpoint.provenance,
    )
