"""A recipe meets its model: everything that is known before a weight is read, and the facts reports share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from svdq_cli.blocks import places_of
from svdq_cli.calibrate.prompt_files import PromptList, prompts_in
from svdq_cli.calibrate.prompt_sets import find_prompt_set, prompts_of_set
from svdq_cli.calibrate.prompts import choose_prompts, dataset_prompts
from svdq_cli.calibrate.settings import DrawSettings, PictureFile, picture_files
from svdq_cli.encoders import require_encoders
from svdq_cli.errors import UsageError
from svdq_cli.families import find_family
from svdq_cli.formats import format_named
from svdq_cli.formats.contract import Format
from svdq_cli.journal import solved_bytes
from svdq_cli.locate import locate_base, locate_file, locate_source
from svdq_cli.parallel import ALONE, Team
from svdq_cli.planning.plan import Inventory, Observation, plan_model, restricted, take_inventory, watch
from svdq_cli.planning.rules import plan_rules
from svdq_cli.planning.structure import STRUCTURAL, Reading
from svdq_cli.recipe import (
    DEFAULT_RANK,
    Calibration,
    DatasetPrompts,
    Recipe,
    default_recipe,
    find_prompts,
    find_source,
)
from svdq_cli.records import (
    BlockSearch,
    ByteFacts,
    Event,
    InspectLayer,
    LayerCounts,
    LayerPlan,
    LayerReport,
    LayerSearch,
    LayerSqnr,
    Linear,
    ModelFacts,
    ModelPlan,
    Observer,
    PromptFacts,
    RankFacts,
    SearchFacts,
    SolveSettings,
    W4A4Plan,
)
from svdq_cli.sampling import sampling_of
from svdq_cli.source import (
    Source,
    component_files,
    denoiser_components,
    merge_loras,
    only,
    open_source,
    pipeline_index,
)
from svdq_cli.tokens import TokenCounts, token_counts
from svdq_cli.writing import Target, require_precision, target_of

# What Wan's own files and ComfyUI's call the second transformer of Wan 2.2.
_LOW_NOISE = re.compile("low[-_ ]?noise", re.IGNORECASE)
_DENOISER_CLASS = re.compile("Transformer|UNet|Prior")  # in the names of diffusers' classes


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is made. Never changes the bytes that come out, but for the lowest bits of layers that are solved on
    another type of device."""

    device: str = "auto"
    overwrite: bool = False
    beside: Path | None = None  # the recipe's folder, for relative paths in it
    work: Path | None = None  # where unfinished work is kept; None: beside the first output
    resume: bool = False  # go on with the work that is kept there
    max_ram: int | None = None  # bytes this process may take; None: what the machine has free
    max_vram: int | None = None  # the same of the GPU's memory
    team: Team = ALONE  # the processes that share the work


DEFAULT_OPTIONS = RunOptions()


@dataclass(frozen=True, slots=True)
class Sampling:
    """What calibration generates with the 16-bit model, and what it keeps of it."""

    settings: DrawSettings
    samples: int  # images, at most
    rows: int  # activation rows kept of every layer input
    size_bytes: int  # that all statistics may take


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


def prepare(
    recipe: Recipe, *, beside: Path | None = None, every_layer: bool = False, source: Source | None = None
) -> Prepared:
    """Find the model, resolve the family's rules, choose the format. Reads headers only.

    `source`: the recipe's (`source_of`), where it is open already.
    `every_layer`: plan what any format could hold, for a calibration that serves them all.
    """
    quantization = recipe.quantization
    formats = [format_named(output.format) for output in recipe.outputs] or [format_named("nunchaku-lite")]
    for fmt in formats:
        require_precision(fmt, quantization.number_format)
    source = source or source_of(recipe, RunOptions(beside=beside))
    recipe = with_model_sampling(recipe, source)
    calibrates = recipe.calibration is not None and (every_layer or quantization.effort != "datafree")
    sampling = sampling_for(recipe, source, beside=beside) if calibrates else None
    if recipe.components and all(fmt.single_file for fmt in formats):
        raise UsageError(
            f"components: {', '.join(recipe.components)} would be lost: single files hold no text encoder",
            hint="drop components, or add an output in format nunchaku-lite",
            where="components",
        )
    require_encoders(source.pipeline, recipe.components)
    plan = plan_model(
        source,
        precision=quantization.number_format,
        rank=DEFAULT_RANK if quantization.rank == "auto" else quantization.rank,  # until it is searched
        family=recipe.model.family,
        overrides=plan_rules(recipe.layers),
        supports=lambda layer: None if every_layer else _objection(formats, layer),
        observe=observation(source, sampling),
    )
    dtype = torch.float16 if recipe.model.dtype == "float16" else torch.bfloat16
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
        plan = restricted(plan, {layer.name for target in targets for layer in target.plan.layers})
    return Prepared(recipe, source, inventory, plan, targets, settings, sampling)


def _objection(formats: Sequence[Format], layer: LayerPlan) -> str | None:
    """Why none of the formats can hold a layer, or None. A format that can't mix holds all of its modules or refuses
    the model, by name and not by leaving a layer out."""
    objections = [fmt.objection(layer) if fmt.mixes else None for fmt in formats]
    return None if None in objections else objections[0]


def observation(source: Source, sampling: Sampling | None = None) -> Observation:
    """How a structural plan sees what layers read: arguments made up from the signature or, where those do not do, the
    pipeline's own."""

    def observe(model: nn.Module, denoiser: Source) -> Mapping[str, Reading] | None:
        from svdq_cli.calibrate.capture import watch_in_pipeline

        if (readings := watch(model)) or source.pipeline is None:
            return readings
        usual = sampling or usual_sampling(source)
        return watch_in_pipeline(source.pipeline, denoiser.component, model, usual.settings)

    return observe


def source_of(recipe: Recipe, options: RunOptions) -> Source:
    """The 16-bit model that a recipe names."""
    wanted = recipe.model
    base = locate_base(wanted.base, beside=options.beside) if wanted.base else None
    path = locate_source(wanted.source, beside=options.beside, revision=wanted.revision)
    weights = (lora.weight for lora in wanted.loras)
    adapters = list(zip(lora_files(recipe, options), weights, strict=True))
    return merge_loras(_with_denoiser(open_source(path, base=base), wanted.denoiser), adapters)


def _with_denoiser(source: Source, wanted: str | None) -> Source:
    """The source with the denoiser that a recipe names alone. A file with one of a pipeline's is taken for the one that
    its name tells, or for the first, which is said."""
    known = denoiser_components(source.pipeline) if source.pipeline else (source.component,)
    if wanted is not None:
        if wanted not in known:
            raise UsageError(
                f"{source.pipeline or source.path} has no denoiser {wanted!r}",
                hint=f"it has {', '.join(known)}",
                where="model.denoiser",
            )
        return only(source, [wanted]) if source.further else replace(source, component=wanted)
    if source.pipeline == source.path or source.path.name in known or len(known) == 1 or source.further:
        return source
    told = known[1] if _LOW_NOISE.search(source.path.stem) else known[0]
    others = [name for name in known if name != told]
    said = (
        f"{source.path} holds one of the {len(known)} denoisers of {source.pipeline}, and is taken for {told}; if it "
        f"is {' or '.join(others)}, say so with --denoiser {others[0]}"
    )
    return replace(source, component=told, warnings=(*source.warnings, said))


def pipeline_of(recipe: Recipe, options: RunOptions) -> Path | None:
    """The pipeline folder of the 16-bit model that a recipe names: its base or, where that is one, its source."""
    if recipe.model.base:
        return locate_base(recipe.model.base, beside=options.beside)
    path = locate_source(recipe.model.source, beside=options.beside, revision=recipe.model.revision)
    return path if (path / "model_index.json").is_file() else None


def lora_files(recipe: Recipe, options: RunOptions) -> tuple[Path, ...]:
    """The LoRAs that a recipe merges: files, or folders of peft's."""
    return tuple(locate_file(lora.path, beside=options.beside) for lora in recipe.model.loras)


@dataclass(frozen=True, slots=True)
class ChosenPrompts:
    """The prompts that a run uses, in their order, and where they come from."""

    texts: tuple[str, ...]
    facts: PromptFacts


def chosen_prompts(recipe: Recipe, options: RunOptions, observe: Observer) -> ChosenPrompts:
    """Of a recipe whose settings are filled in (`with_model_sampling`). Read once per run and carried from there on
    (`Prepared.prompts`): a file may change, and a data set on the hub takes its time. A note says what was read.
    UsageError for a recipe that names none."""
    wanted = recipe.calibration
    if wanted is None or wanted.prompts is None or wanted.samples is None:
        raise UsageError("the recipe names no calibration prompts", hint="give --prompts FILE")
    found = _prompt_list(wanted.prompts, options.beside)
    texts = choose_prompts(found.texts, samples=wanted.samples, seed=wanted.seed, observe=observe)
    facts = PromptFacts(found.origin, len(found.texts), len(texts))
    count = (
        f"{facts.used} prompts"
        if facts.used == facts.available
        else f"{facts.used} of {facts.available} prompts"
    )
    observe(Event("note", "prompts", detail=f"{count} from {facts.read_from}"))
    return ChosenPrompts(texts, facts)


def _prompt_list(wanted: str | DatasetPrompts, beside: Path | None) -> PromptList:
    if isinstance(wanted, str):
        if known := find_prompt_set(wanted):
            return PromptList(prompts_of_set(known), known.name)
        return prompts_in(find_prompts(wanted, beside))
    name, plain = wanted.dataset, wanted.config is None and wanted.split is None
    if plain and wanted.column is None and (known := find_prompt_set(name)):
        return PromptList(prompts_of_set(known), known.name)
    local = Path(find_source(name, beside)).expanduser()
    if plain and (local.exists() or local.suffix):
        return prompts_in(find_prompts(name, beside), column=wanted.column)
    found = dataset_prompts(name, config=wanted.config, split=wanted.split, column=wanted.column)
    return PromptList(found.texts, f"column {found.column} of {name}")


def prompts_of(prepared: Prepared, options: RunOptions, observe: Observer) -> ChosenPrompts:
    """The prompts that its recipe names: those that were read before, or read now."""
    return prepared.prompts or chosen_prompts(prepared.recipe, options, observe)


def with_model_sampling(recipe: Recipe, source: Source, *, held_out: bool = False) -> Recipe:
    """The recipe with every setting of its calibration that it leaves open filled in with the model's own.

    `held_out`: for evaluation, with prompts that calibration does not see.
    """
    wanted = recipe.calibration
    if wanted is None:
        return recipe
    own = sampling_of(source, loras=[lora.path for lora in recipe.model.loras])
    of_model = {
        "prompts": own.held_out_prompts if held_out else own.prompts,
        "samples": own.samples,
        "steps": own.steps,
        "height": own.height,
        "width": own.width,
        "batch_size": own.batch_size,
        "max_sequence_length": own.max_sequence_length,
    }
    if wanted.guidance is None and wanted.true_cfg is None:
        of_model |= {"guidance": own.guidance, "true_cfg": own.true_cfg}
    filled = {name: value for name, value in of_model.items() if getattr(wanted, name) is None}
    return recipe.model_copy(update={"calibration": wanted.model_copy(update=filled)})


def sampling_for(recipe: Recipe, source: Source, *, beside: Path | None = None) -> Sampling:
    """What the calibration of a recipe samples. Images that the pipeline reads are hashed here, once."""
    wanted = with_model_sampling(recipe, source).calibration
    assert wanted is not None
    samples, steps, height, width, batch = (
        int(value or 0)
        for value in (wanted.samples, wanted.steps, wanted.height, wanted.width, wanted.batch_size)
    )
    settings = DrawSettings(
        steps=steps,
        guidance=wanted.guidance,
        height=height,
        width=width,
        seed=wanted.seed,
        max_sequence_length=wanted.max_sequence_length,
        batch_size=batch,
        true_cfg=wanted.true_cfg or 1.0,
        image=_pictures(wanted.image, beside),
        mask=_pictures(wanted.mask, beside),
        frames=wanted.frames,
        strength=wanted.strength,
    )
    return Sampling(settings, samples, wanted.rows, wanted.size_bytes)


def usual_sampling(source: Source) -> Sampling:
    """How a model is sampled where nobody says anything else."""
    return sampling_for(default_recipe("model", calibration=Calibration()), source)


def counts_of(prepared: Prepared, settings: DrawSettings) -> TokenCounts:
    """Tokens of every layer of the model where images are generated with `settings`."""
    return token_counts(
        prepared.source,
        prepared.inventory.linears,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        max_sequence_length=settings.max_sequence_length,
        vectors={layer.name for layer in prepared.plan.w4a16},
    )


def _pictures(path: str | None, beside: Path | None) -> tuple[PictureFile, ...]:
    return picture_files(Path(find_source(path, beside)).expanduser()) if path else ()


# ------------------------------------------------------------------------------------------------- facts for reports


def is_data_free(recipe: Recipe, calibration: Path | None) -> bool:
    return recipe.quantization.effort == "datafree" or (recipe.calibration is None and calibration is None)


def warnings_of(prepared: Prepared, *, data_free: bool) -> tuple[str, ...]:
    found = list(prepared.source.warnings)
    if prepared.source.pipeline is None and not all(t.format.single_file for t in prepared.targets):
        found.append(
            f"{prepared.source.path} is no whole pipeline, and so the output is only its {prepared.source.component}; "
            "name the pipeline it belongs to with --base"
        )
    found += _denoisers_left_out(prepared.source)
    if data_free:
        cure = (
            "--effort fast, balanced or best calibrates"
            if prepared.recipe.quantization.effort == "datafree"
            else "name prompts with --prompts or a recipe, or give --calib"
        )
        found.append(
            f"data-free: no calibration, so activations are not smoothed and quality is lower; {cure}"
        )
    if prepared.plan.family == STRUCTURAL:
        found.append(_structural_warning(prepared.plan))
    places = places_of([linear.name for linear in prepared.inventory.linears])
    unfit = [linear for linear in prepared.plan.kept if places[linear.name].stack]
    if unfit:
        found.append(f"{len(unfit)} block layers stay at 16 bit, the first is {unfit[0].name}")
    return tuple(found)


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
            f"{name} ({kind}, {size / 1e9:.2f} GB), another denoiser of the pipeline, is not converted: it stays as "
            f"it is in {source.pipeline}"
        )


def _structural_warning(plan: ModelPlan) -> str:
    seen = any(len(shared.layers) > 1 for shared in plan.inputs)
    return (
        f"svdq has no family file for {plan.model_class}: it is planned by its structure"
        + ("" if seen else ", and no forward pass showed which layers share an input or are modulation")
        + "; svdq init writes the plan as rules to check and edit"
    )


def predicted_sizes(prepared: Prepared) -> ByteFacts:
    """Of the first output."""
    state = prepared.inventory.state
    return sizes_of(state, prepared.targets[0].bytes(state))


def disk_bytes(prepared: Prepared) -> int:
    """What all outputs take together, the other components of a pipeline's copy included."""
    state = prepared.inventory.state
    folders = [target for target in prepared.targets if not target.format.single_file]
    packed = sum(target.bytes(state) for target in prepared.targets)
    return packed + len(folders) * other_components_bytes(prepared.source)


def work_bytes(plan: ModelPlan, dtype: torch.dtype) -> int:
    """What the solved layers of a plan take in the work folder."""
    return sum(solved_bytes(layer, dtype) for layer in plan.layers)


def inputs_of(prepared: Prepared, calibration: Path | None) -> tuple[Path, ...]:
    """The files and folders that a conversion reads."""
    source = prepared.source
    return tuple(path for path in (source.path, source.pipeline, calibration) if path is not None)


def sizes_of(state: Mapping[str, tuple[int, ...]], output: int) -> ByteFacts:
    """`input` counts every tensor at 16 bit, whatever the source stores, so that the ratio means what it says."""
    count = 2 * sum(torch.Size(shape).numel() for shape in state.values())
    return ByteFacts(count, output, count / output)


def other_components_bytes(source: Source) -> int:
    """What is copied beside the quantized component: the pipeline's other components, or the base pipeline's."""
    if source.pipeline is None:
        return 0
    return sum(file.stat().st_size for file in component_files(source.pipeline, skip=source.components))


def layer_counts(plan: ModelPlan) -> LayerCounts:
    return LayerCounts(len(plan.w4a4), len(plan.w4a16), len(plan.kept))


def rank_facts(prepared: Prepared) -> RankFacts:
    ranks = [layer.rank for layer in prepared.plan.w4a4] or [0]
    return RankFacts(prepared.recipe.quantization.rank, min(ranks), sum(ranks) / len(ranks), max(ranks))


def model_facts(prepared: Prepared, digest: str | None) -> ModelFacts:
    plan = prepared.plan
    return ModelFacts(plan.family, plan.model_class, plan.parameters, digest)


def layer_sqnr(reports: list[LayerReport]) -> LayerSqnr:
    per_layer = {report.name: round(report.sqnr_db, 3) for report in reports}
    return LayerSqnr(sum(per_layer.values()) / len(per_layer), min(per_layer.values()), per_layer)


def search_facts(reports: list[LayerReport], blocks: Mapping[str, BlockSearch]) -> SearchFacts:
    layers = {
        report.name: LayerSearch(
            report.rank,
            report.smoothing,
            report.steps_db,
            report.steps_seconds,
            report.steps_taken,
            report.fallback,
            report.device,
        )
        for report in reports
    }
    return SearchFacts(layers, blocks)


def inspect_layer(
    linear: Linear, plan: LayerPlan | None, input_of: Mapping[str, str] | None = None
) -> InspectLayer:
    """`input_of`: the name of the shared input of every quantized layer, where a plan knows it."""
    role = "kept" if plan is None else "w4a4" if isinstance(plan, W4A4Plan) else "w4a16"
    rank = plan.rank if isinstance(plan, W4A4Plan) else None
    shared = (input_of or {}).get(linear.name)
    return InspectLayer(linear.name, linear.in_features, linear.out_features, role, rank, shared)
