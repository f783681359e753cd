"""Facts of a prepared model, as reports have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from svdq_cli.checkpoint.text_encoders import EncoderPlan
from svdq_cli.planning.structure import STRUCTURAL
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.records import (
    LayerPlan,
    LayerReport,
    Linear,
    ModelPlan,
    RotatedPlan,
    W4A4Plan,
    W4A16Plan,
)
from svdq_cli.reports import (
    ByteFacts,
    HiddenSqnr,
    InspectLayer,
    LayerCounts,
    LayerSqnr,
    ModelFacts,
    OutputSearch,
    RankFacts,
    SearchFacts,
    TextEncoderFacts,
    TuningSearch,
)
from svdq_cli.source import Source, component_files


def predicted_sizes(prepared: Prepared) -> ByteFacts:
    """Predicted sizes of the first output."""
    state = prepared.inventory.state
    return sizes_of(state, prepared.targets[0].bytes(state))


def inputs_of(prepared: Prepared, calibration: Path | None) -> tuple[Path, ...]:
    """The files and folders that a conversion reads."""
    source = prepared.source
    return tuple(path for path in (source.path, source.pipeline, calibration) if path is not None)


def sizes_of(state: Mapping[str, tuple[int, ...]], output: int) -> ByteFacts:
    """`input` counts every tensor at 16 bits, whatever the source stores, so that the ratio means what it says."""
    count = 2 * sum(torch.Size(shape).numel() for shape in state.values())
    return ByteFacts(count, output, count / output)


def other_components_bytes(source: Source, encoders: Sequence[EncoderPlan] = ()) -> int:
    """The files copied next to the quantized component: the pipeline's other components, or the base pipeline's.
    `encoders`: those that get 4-bit weights."""
    if source.pipeline is None:
        return 0
    skip = {*source.components, *(plan.component for plan in encoders)}
    copied = sum(file.stat().st_size for file in component_files(source.pipeline, skip=skip))
    return copied + sum(plan.bytes_after for plan in encoders)


def encoder_facts(
    plan: EncoderPlan,
    *,
    calibrated: bool | None = None,
    layer_sqnr_db: LayerSqnr | None = None,
    hidden_sqnr_db: HiddenSqnr | None = None,
) -> TextEncoderFacts:
    """What a plan says of a text encoder, and what is known once it is quantized."""
    before, after = plan.bytes_before, plan.bytes_after
    size = ByteFacts(before, after, before / after)
    return TextEncoderFacts(
        plan.class_name, size, len(plan.layers), plan.kept, calibrated, layer_sqnr_db, hidden_sqnr_db
    )


def encoders_planned(prepared: Prepared) -> dict[str, TextEncoderFacts]:
    """The text encoders that will have 4-bit weights, by component."""
    return {plan.component: encoder_facts(plan) for plan in prepared.encoders}


def other_weights(source: Source) -> dict[str, int]:
    """The weight files of the pipeline's other components, by their path in it, with their bytes as they are stored
    (text encoders in 16 bits). Empty for a source that is one component."""
    if source.pipeline is None:
        return {}
    files = sorted(component_files(source.pipeline, skip=source.components))
    return {
        file.relative_to(source.pipeline).as_posix(): file.stat().st_size
        for file in files
        if file.suffix in (".safetensors", ".bin")
    }


def layer_counts(plan: ModelPlan) -> LayerCounts:
    four = sum(layer.activation_bits == 4 for layer in plan.rotated)
    return LayerCounts(len(plan.w4a4) + four, len(plan.w4a16), len(plan.kept), w4a8=len(plan.rotated) - four)


def layers_text(counts: LayerCounts) -> str:
    """The counts as people read them; only those of kinds that every output may have are there when they are 0."""
    eight = f"{counts.w4a8} W4A8, " if counts.w4a8 else ""
    return f"{counts.w4a4} W4A4, {eight}{counts.w4a16} W4A16, {counts.kept} kept at 16 bits"


def rank_facts(prepared: Prepared) -> RankFacts:
    ranks = [layer.rank for layer in prepared.plan.w4a4] or [0]
    return RankFacts(prepared.recipe.quantization.rank, min(ranks), sum(ranks) / len(ranks), max(ranks))


def model_facts(prepared: Prepared, digest: str | None) -> ModelFacts:
    plan = prepared.plan
    return ModelFacts(plan.family, plan.model_class, plan.parameters, digest)


def layer_sqnr(reports: list[LayerReport]) -> LayerSqnr:
    per_layer = {report.name: round(report.sqnr_db, 3) for report in reports}
    return LayerSqnr(sum(per_layer.values()) / len(per_layer), min(per_layer.values()), per_layer)


def search_facts(
    reports: list[LayerReport], tuning: Mapping[str, TuningSearch], outputs: Mapping[str, OutputSearch]
) -> SearchFacts:
    return SearchFacts({report.name: report.search for report in reports}, tuning, outputs)


def inspect_layer(
    linear: Linear, plan: LayerPlan | None, input_of: Mapping[str, str] | None = None, why: str | None = None
) -> InspectLayer:
    """`input_of`: the name of the shared input of every quantized layer, where a plan knows it. `why`: it is kept."""
    rank = plan.rank if isinstance(plan, W4A4Plan) else None
    shared = (input_of or {}).get(linear.name)
    role = _role(plan)
    kept_because = why if role == "kept" else None
    return InspectLayer(
        linear.name, linear.in_features, linear.out_features, role, rank, shared, kept_because
    )


def why_kept(plan: ModelPlan, name: str) -> str:
    """Why a layer of the plan stays at 16 bits."""
    if reason := plan.kept_because.get(name):
        return reason
    if plan.family == STRUCTURAL:
        return "its place in the model's structure"
    return f"a rule of family {plan.family} keeps it"


def _role(plan: LayerPlan | None) -> Literal["w4a4", "w4a8", "w4a16", "kept"]:
    match plan:
        case None:
            return "kept"
        case W4A4Plan() | RotatedPlan(activation_bits=4):
            return "w4a4"
        case RotatedPlan():
            return "w4a8"
        case W4A16Plan():
            return "w4a16"
