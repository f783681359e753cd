"""`svdq inspect`: what becomes of each layer of a 16-bit model, or what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path

from svdq_cli.checkpoint.check_encoders import four_bit_encoders, stored_facts
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.prepare.facts import encoders_planned, inspect_layer, predicted_sizes, sizes_of, why_kept
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.origin import named_loras
from svdq_cli.prepare.plan_warnings import plan_warnings
from svdq_cli.prepare.prepare import Prepared, prepare
from svdq_cli.recipe import Recipe
from svdq_cli.reports import InspectReport


def inspect_source(recipe: Recipe, *, options: RunOptions = DEFAULT_OPTIONS) -> InspectReport:
    """What becomes of each layer of a 16-bit model."""
    return inspect_prepared(prepare(recipe, beside=options.beside))


def inspect_prepared(prepared: Prepared) -> InspectReport:
    """What becomes of each layer of a model that is planned already."""
    quantization = prepared.recipe.quantization
    planned = prepared.plan.by_name
    input_of = {name: shared.name for shared in prepared.plan.inputs for name in shared.layers}
    return InspectReport(
        kind="source",
        family=prepared.plan.family,
        model_class=prepared.plan.model_class,
        format=prepared.targets[0].format.name,
        precision=quantization.precision,
        rank=int(quantization.rank),
        parameters=prepared.plan.parameters,
        layers=tuple(
            inspect_layer(linear, planned.get(linear.name), input_of, why_kept(prepared.plan, linear.name))
            for linear in prepared.inventory.linears
        ),
        bytes=predicted_sizes(prepared),
        provenance=None,
        read_as=prepared.source.kind,
        text_encoders=encoders_planned(prepared),
        warnings=(
            *prepared.source.warnings,
            *(said for target in prepared.targets for said in target.format.warnings(target.stored_plan)),
            *plan_warnings(prepared.plan, prepared.inventory),
        ),
    )


def inspect_checkpoint(path: Path, *, base: Path | None = None) -> InspectReport:
    """What a converted checkpoint holds, from its headers. `base`: see `open_checkpoint`."""
    checkpoint = open_checkpoint(path, base=base)
    own = checkpoint.source.pipeline if path.is_dir() else None
    linears = [plan.linear for plan in checkpoint.layers] + list(checkpoint.kept)
    return InspectReport(
        kind="checkpoint",
        family=checkpoint.family,
        model_class=checkpoint.model_class,
        format=checkpoint.format.name,
        precision=checkpoint.precision.name if checkpoint.precision else None,
        rank=checkpoint.rank,
        parameters=checkpoint.parameters,
        layers=tuple(inspect_layer(linear, checkpoint.by_name.get(linear.name)) for linear in linears),
        bytes=sizes_of(checkpoint.state, checkpoint.source.file_bytes),
        provenance=checkpoint.provenance,
        loras=tuple(map(str, named_loras(checkpoint))),
        text_encoders={name: stored_facts(own, name) for name in four_bit_encoders(own)} if own else {},
        warnings=checkpoint.format.warnings(checkpoint.plan()),
    )
