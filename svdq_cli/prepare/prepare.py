"""A recipe meets its model: everything that is known before a weight is read, and the facts reports share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from svdq_cli.checkpoint.text_encoders import EncoderPlan, plan_encoders
from svdq_cli.checkpoint.writer import Target, require_precision, target_of
from svdq_cli.errors import UsageError
from svdq_cli.families import find_family
from svdq_cli.formats import DEFAULT, format_named
from svdq_cli.formats.contract import Format
from svdq_cli.pipelines.settings import SamplingSettings, given_inputs
from svdq_cli.planning.inventory import empty_model
from svdq_cli.planning.plan import Inventory, plan_model, restricted, take_inventory, watch_denoisers
from svdq_cli.planning.structure import Reading
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.plan_warnings import plan_warnings
from svdq_cli.prepare.prompts import ChosenPrompts, chosen_prompts
from svdq_cli.prepare.sampling import Sampling, sampling_for, usual_sampling, with_model_sampling
from svdq_cli.prepare.sources import source_of, with_denoisers_of_loras
from svdq_cli.recipe import (
    DEFAULT_RANK,
    Recipe,
)
from svdq_cli.records import (
    LayerPlan,
    ModelPlan,
    Observer,
    Precision,
    Scheme,
    SolveSettings,
)
from svdq_cli.sampling.passes import step_passes
from svdq_cli.sampling.token_counts import TokenCounts, token_counts
from svdq_cli.source import Source, denoisers_of, pipeline_index

_DENOISER_CLASS = re.compile("Transformer|UNet|Prior")  # in the names of diffusers' classes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe that met its model: everything that is known before a weight is read.

    `recipe` names every setting of its calibration: where the user's is silent, the model's own. `sampling` is None
    where nothing is calibrated.
    """

    recipe: Recipe
    source: Source
    inventory: Inventory
    plan: ModelPlan  # everything that any of the outputs quantizes
    targets: tuple[Target, ...]  # one for each output, at least one
    settings: SolveSettings
    sampling: Sampling | None
    prompts: ChosenPrompts | None = None  # of a run that uses any, once they were read
    encoders: tuple[EncoderPlan, ...] = ()  # text encoders that get 4-bit weights


def prepare(
    recipe: Recipe, *, beside: Path | None = None, every_layer: bool = False, source: Source | None = None
) -> Prepared:
    """Find the model, resolve the family's rules, choose the format. Reads headers only.

    `source`: the recipe's (`source_of`), where it is open already.
    `every_layer`: plan what any format could hold, for a calibration that serves them all.
    """
    quantization = recipe.quantization
    formats = [format_named(output.format) for output in recipe.outputs] or [format_named(DEFAULT)]
    for fmt in formats:
        require_precision(fmt, quantization.number_format)
    scheme = _one_scheme(formats, quantization.number_format)
    source = source or source_of(recipe, RunOptions(beside=beside))
    recipe = with_model_sampling(with_denoisers_of_loras(recipe, source), source)
    calibrates = recipe.calibration is not None and (every_layer or quantization.effort != "datafree")
    sampling = sampling_for(recipe, source, beside=beside) if calibrates else None
    if recipe.components and all(fmt.single_file for fmt in formats):
        raise UsageError(
            f"components: {', '.join(recipe.components)} would be lost: single files can't hold a text encoder",
            hint="drop components, or add an output in format nunchaku-lite",
            where="components",
        )
    dtype = torch.float16 if recipe.model.dtype == "float16" else torch.bfloat16
    encoders = plan_encoders(source.pipeline, recipe.components, dtype=dtype, replaced=source.companions)
    plan = plan_model(
        source,
        precision=quantization.number_format,
        rank=DEFAULT_RANK if quantization.rank == "auto" else quantization.rank,  # until it is searched
        scheme=scheme,
        family=recipe.model.family,
        overrides=recipe.layers,
        supports=lambda layer: None if every_layer else _unsupported_reason(formats, layer),
        keeps_modulation=recipe.modulation == "keep",
        calibrated_with=None if sampling is None else given_inputs(sampling.settings),
        readings=_readings(source, recipe.model.family, sampling),
    )
    if scheme == "smoothing":
        plan = plan.with_whole_inputs()
    elif not _shares_branches(quantization.share_branches, formats):
        plan = plan.with_own_branches()
    settings = SolveSettings(
        quantization.chosen_smoothing,
        quantization.seed,
        dtype,
        quantization.chosen_search,
        quantization.refinements,
    )
    inventory = take_inventory(source, find_family(source.config))
    targets = tuple(target_of(fmt, plan, inventory.state, dtype) for fmt in formats)
    if not every_layer:
        held = {layer.name for target in targets for layer in target.plan.layers}
        plan = restricted(plan, held, targets[0].plan.kept_because)
    return Prepared(recipe, source, inventory, plan, targets, settings, sampling, encoders=encoders)


def _shares_branches(wanted: bool | Literal["auto"], formats: Sequence[Format]) -> bool:
    """Whether layers of one input share their down projection; `auto`: unless every output keeps them apart."""
    return not all(fmt.own_names for fmt in formats) if wanted == "auto" else wanted


def _one_scheme(formats: Sequence[Format], precision: Precision) -> Scheme:
    """UsageError for formats whose layers are solved in two ways."""
    schemes: set[Scheme] = {fmt.scheme_of(precision) for fmt in formats}
    if len(schemes) > 1:
        alone = next(fmt for fmt in formats if fmt.scheme_of(precision) != "branch")
        other = next(fmt.name for fmt in formats if fmt.scheme_of(precision) == "branch")
        rotates = "rotates inputs and " if alone.scheme_of(precision) == "rotation" else ""
        raise UsageError(
            f"{alone.name} {rotates}has no low-rank branch, so its layers are solved in another way than those "
            f"of {other}",
            hint="convert once for each; svdq calibrate makes statistics that serve both (--calib)",
            where="outputs",
        )
    return schemes.pop()


def _unsupported_reason(formats: Sequence[Format], layer: LayerPlan) -> str | None:
    """Why none of the formats can hold a layer, or None. A format that can't mix holds all of its modules or refuses
    the model, by name and not by leaving a layer out."""
    reasons = [fmt.unsupported_reason(layer) if fmt.mixes else None for fmt in formats]
    return None if None in reasons else reasons[0]


def _readings(
    source: Source, family: str, sampling: Sampling | None
) -> dict[str, Mapping[str, Reading] | None]:
    """What a structural plan rests on: arguments made up from the signature or, where those do not do, the pipeline's
    own."""
    readings = watch_denoisers(source, family)
    for part in denoisers_of(source):
        if source.pipeline is not None and part.component in readings and not readings[part.component]:
            from svdq_cli.pipelines.capture import watch_in_pipeline

            usual = sampling or usual_sampling(source)
            readings[part.component] = watch_in_pipeline(
                source.pipeline, part.component, empty_model(part, None), usual.settings
            )
    return readings


def prompts_of(prepared: Prepared, options: RunOptions, observe: Observer) -> ChosenPrompts:
    """The prompts that its recipe names: those that were read before, or read now."""
    return prepared.prompts or chosen_prompts(prepared.recipe, options, observe)


def counts_of(prepared: Prepared, settings: SamplingSettings) -> TokenCounts:
    """Tokens of every layer of the model where images are generated with `settings`, and the passes of a step."""
    return token_counts(
        prepared.source,
        prepared.inventory.linears,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        fps=settings.fps,
        max_sequence_length=settings.max_sequence_length,
        vectors={layer.name for layer in prepared.plan.w4a16},
        passes=step_passes(prepared.source, guidance=settings.guidance, true_cfg=settings.true_cfg),
    )


# ------------------------------------------------------------------------------------------------- facts for reports


def warnings_of(prepared: Prepared, *, data_free: bool) -> tuple[str, ...]:
    found = list(prepared.source.warnings)
    if prepared.source.pipeline is None and not all(t.format.single_file for t in prepared.targets):
        found.append(
            f"{prepared.source.path} is not a whole pipeline, so the output is only its {prepared.source.component}; "
            "name the pipeline it belongs to with --base"
        )
    found += _denoisers_left_out(prepared.source)
    found += _branchless_warnings(prepared)
    if data_free:
        cure = (
            "use --effort fast, balanced or best to calibrate"
            if prepared.recipe.quantization.effort == "datafree"
            else "name prompts with --prompts or a recipe, or give --calib"
        )
        lost = "activations are not smoothed" if prepared.plan.w4a4 else "weights are rounded to nearest"
        found.append(f"data-free: no calibration, so {lost} and quality is lower; {cure}")
    for target in prepared.targets:
        found += target.format.warnings(target.stored_plan)
    return (*found, *plan_warnings(prepared.plan, prepared.inventory))


def _branchless_warnings(prepared: Prepared) -> Iterator[str]:
    """What a format without a low-rank branch costs."""
    name = prepared.targets[0].format.name
    budget = prepared.recipe.quantization.size_bytes
    if prepared.plan.rotated:
        lost, cure = "5", "a size_budget gives layers 8-bit activations"
    elif any(plan.branchless for plan in prepared.plan.w4a4):
        lost, cure = "2.5", "a size_budget leaves layers at 16 bits"
    else:
        return
    yield (
        f"{name} has no low-rank branch, and rank is not used: its W4A4 layers are less exact than SVDQuant's, by "
        f"{lost} dB on the embedded demo model{'' if budget else f'; {cure}'}"
    )
    if prepared.recipe.quantization.effort == "best":
        yield f"{name}: effort best does what balanced does: models are tuned by their low-rank branches"


def _denoisers_left_out(source: Source) -> Iterator[str]:
    """Warnings of denoisers of the pipeline that are copied as they are."""
    if source.pipeline is None:
        return
    for name, value in pipeline_index(source.pipeline).items():
        kind = value[1] if isinstance(value, list) and len(value) == 2 else None
        if name in source.components or not isinstance(kind, str) or not _DENOISER_CLASS.search(kind):
            continue
        size = sum(file.stat().st_size for file in (source.pipeline / name).glob("*.safetensors"))
        yield (
            f"{name} ({kind}, {size / 1e9:.2f} GB), a second denoiser of the pipeline, is not converted: it stays as "
            f"it is in {source.pipeline}"
        )
