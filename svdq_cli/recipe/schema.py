"""The recipe's sections as frozen records: names, types, bounds and defaults. The docstrings under the fields are the
comments of `svdq init` and the descriptions of the JSON Schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from svdq_cli.errors import UsageError
from svdq_cli.formats import DEFAULT, NAMES
from svdq_cli.recipe.gates import CONDITION_PATTERN, METRICS, Gate, parse_gate
from svdq_cli.recipe.problems import problems_of
from svdq_cli.records import MAX_SEED, Effort, Int4, NvFp4, Precision, SearchStep, Smoothing
from svdq_cli.storage.output_paths import distinct_names
from svdq_cli.text import SIZE_HINT, SIZE_PATTERN, bytes_of_size

DEFAULT_EFFORT: Effort = "balanced"
DEFAULT_RANK = 32
SMOOTHING_OF_EFFORT: dict[Effort, Smoothing] = {
    "datafree": "none",
    "fast": "grid",
    "balanced": "grid",
    "best": "grid",
}
ALL_STEPS: tuple[SearchStep, ...] = get_args(SearchStep)
# No effort moves means: a LoRA that a runtime loads by itself would lack its part of them.
_USUAL_STEPS: tuple[SearchStep, ...] = tuple(step for step in ALL_STEPS if step != "means")
STEPS_OF_EFFORT: dict[Effort, tuple[SearchStep, ...]] = {
    "datafree": (),
    "fast": ("refine",),  # next to the paper's search, as its own tool has it
    "balanced": _USUAL_STEPS,
    "best": _USUAL_STEPS,
}

# One of `formats.NAMES`; pydantic, editors and error messages get the list.
if TYPE_CHECKING:
    OutputFormat = str
else:
    OutputFormat = Literal[NAMES]


def _without_nul(value: str) -> str:
    if "\0" in value:
        hint = "remove \\0: no file name and no layer name contains it"
        raise PydanticCustomError("nul", "must not hold a NUL character", {"hint": hint})
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
MAX_PATTERN = 512  # characters; the longest layer name of a known model has 65
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
MAX_STRENGTH = 1000
Strength = Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


def _size(value: object) -> int | str:
    """A size as it was written."""
    if isinstance(value, int | str) and not isinstance(value, bool) and bytes_of_size(value):
        return value
    raise PydanticCustomError(
        "size",
        "must be a number of bytes, or one with its unit, not {value}",
        {"value": repr(value), "hint": SIZE_HINT},
    )


SizeBudget = Annotated[
    int | str,
    PlainValidator(_size),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}
    ),
]
Pixels = Annotated[int, Field(ge=8, multiple_of=8)]


class Section(BaseModel):
    """A mapping of the recipe: only known keys, exact types, never changed after reading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _knows_every_key(cls, value: object) -> object:
        """Unknown keys, with the names that would have been right."""
        if isinstance(value, dict):
            given = cast("dict[str, object]", value)
            unknown = [key for key in given if key not in cls.model_fields]
            if unknown:
                known = [key for key in cls.model_fields if key not in given]
                context = {"keys": unknown, "known": known, "elsewhere": _places(unknown)}
                raise PydanticCustomError("unknown_keys", "unknown key", context)
            # A section with everything in it commented out has its defaults
            return {
                key: item for key, item in given.items() if item is not None or not cls._may_be_empty(key)
            }
        return value

    @classmethod
    def _may_be_empty(cls, key: str) -> bool:
        return isinstance(cls.model_fields[key].default, (Section, tuple))


MAX_RANK = 16384  # no model's matrices have more rows and columns


def _multiple_of_16_or_auto(value: object) -> object:
    number = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if value == "auto" or (0 < number <= MAX_RANK and number % 16 == 0):
        return value
    wanted = f"at most {MAX_RANK}" if number > MAX_RANK else "a multiple of 16, or auto"
    raise PydanticCustomError(
        "rank",
        "must be {wanted}, not {value}",
        {"value": repr(value), "wanted": wanted, "hint": "the 4-bit runtimes take ranks 16, 32, 48, 64, ..."},
    )


FixedRank = Annotated[int, Field(ge=16, le=MAX_RANK, multiple_of=16)]
Rank = Annotated[FixedRank | Literal["auto"], BeforeValidator(_multiple_of_16_or_auto)]


class Lora(Section):
    """An adapter that is merged into the model before it is quantized."""

    path: Text
    """A LoRA's .safetensors file, or the folder that peft saved it in."""
    weight: Strength = 1.0
    """Strength: 1 is as trained."""
    component: Text | None = None
    """The denoiser it is for, in a pipeline with several (Wan 2.2: transformer has the steps with much noise,
    transformer_2 the rest); absent, names tell: of the layers in the file, or of the file (high_noise, low_noise)."""

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Recipes of models with one denoiser read, and are compared, as if there were no `component`."""
        return {key: value for key, value in whole(self).items() if key != "component" or value is not None}


class Model(Section):
    """The model to convert."""

    source: Text
    """A diffusers pipeline folder, a .safetensors or .gguf checkpoint, a Hub id, demo or demo:outliers."""
    base: Text | None = None
    """The pipeline (folder or Hub id) with the parts that a single-file source lacks."""
    denoiser: Text | None = None
    """Which denoiser of a pipeline with several to convert, or which one a file holds; all of them when absent."""
    family: Text = "auto"
    """The model family; auto detects it from the model's config."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """The 16-bit type of everything that is not quantized."""
    revision: Text | None = None
    """The revision of a Hub id: a branch, tag or commit."""
    loras: Annotated[tuple[Lora, ...], Field(strict=False)] = ()
    """LoRAs to merge before the conversion, in this order: {path, weight, component}."""


class DatasetPrompts(Section):
    """Prompts from a data set, read with `datasets`."""

    dataset: Text
    """A Hub name, MJHQ-30K, sDCI or PartiPrompts, or the path of a local .csv, .tsv, .json, .jsonl or .parquet file."""
    config: Text | None = None
    """The configuration, for data sets with several."""
    split: Text | None = None
    """The split to read; train, or the only one, when absent."""
    column: Text | None = None
    """The column that holds the prompt; prompt, caption, text or another usual name when absent."""


def _prompts_kind(value: object) -> str:
    return "dataset prompts" if isinstance(value, (dict, DatasetPrompts)) else "prompt file"


Prompts = Annotated[
    Annotated[Text, Tag("prompt file")] | Annotated[DatasetPrompts, Tag("dataset prompts")],
    Discriminator(_prompts_kind),
]


class Calibration(Section):
    """Prompts for which the 16-bit model generates images, to record its activations."""

    prompts: Prompts | None = None
    """A text file with a prompt per line, or {dataset, config, split, column}; one that fits the model when absent."""
    samples: Count | None = None
    """Number of prompts; 64 when absent, 96 for models with few steps."""
    steps: Count | None = None
    """Denoising steps per image; the model's own when absent, at most 20."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Guidance scale; the model's own when absent."""
    true_cfg: Annotated[float, Field(ge=0)] | None = None
    """Scale of true guidance, with a second, negative pass; the model's own when guidance is absent too."""
    height: Pixels | None = None
    """Image height in pixels; the model's own when absent."""
    width: Pixels | None = None
    """Image width in pixels; the model's own when absent."""
    seed: Seed = 0
    """Seed of the first image's noise; the next image has the next seed."""
    max_sequence_length: Count | None = None
    """Number of text tokens that prompts are padded to, if the pipeline has a choice."""
    image: Text | None = None
    """An image, or a folder, for pipelines that edit images or start videos from one; prompt i uses image i."""
    mask: Text | None = None
    """A mask, or a folder of masks, for inpainting pipelines; prompt i uses mask i."""
    video: Text | None = None
    """A video, or a folder of videos, for pipelines that start from one or take its motion; prompt i uses video i."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """How much the image is changed, for image-to-image pipelines; the pipeline's own when absent."""
    frames: Count | None = None
    """Frames per video, for pipelines that generate videos; the pipeline's own when absent."""
    fps: Annotated[float, Field(gt=0, le=240)] | None = None
    """Frames per second: of videos that are written, and for pipelines that read it; the pipeline's own when absent."""
    batch_size: Count | None = None
    """Images generated at once: faster, but more memory; 1 when absent, more for very small models."""
    rows: Count = 4096
    """Activation rows kept for each layer input, for the search."""
    size_budget: SizeBudget = "20GB"
    """Limit of the bytes of the statistics: fewer rows are kept if all of them would take more."""

    @property
    def size_bytes(self) -> int:
        """`size_budget` in bytes."""
        size = bytes_of_size(self.size_budget)
        assert size is not None  # the field's own check
        return size


class Quantization(Section):
    """The 4-bit format of the weights, and the effort of the search."""

    precision: Literal["int4", "nvfp4"] = "int4"
    """int4 (any tensor-core GPU) or nvfp4 (Blackwell)."""
    effort: Effort = DEFAULT_EFFORT
    """datafree (no calibration), fast, balanced or best."""
    smoothing: Smoothing | None = None
    """none, closed-form or grid: the start of the search; the effort's choice when absent."""
    search: Annotated[tuple[SearchStep, ...] | None, Field(strict=False)] = None
    """Steps beyond the paper's: means, learned, refine, gptq, scales (with gptq), refit, output; else the effort's."""
    refinements: Annotated[int, Field(ge=0, le=20)] = 5
    """Rounds at most that fit branch and codes to each other: without calibration, and in the step refine."""
    rank: Rank = DEFAULT_RANK
    """Rank of the 16-bit branch: a multiple of 16, or auto (searched per layer)."""
    share_branches: bool | Literal["auto"] = True
    """One down projection for q, k and v: true, false, or auto (false where every output keeps them apart)."""
    size_budget: SizeBudget | None = None
    """Most bytes of an output's weight files, such as 6.5GB: layers that lose most by 4 bits, per byte, stay at 16."""
    seed: Seed = 0
    """Seed of the randomized search."""

    @model_validator(mode="after")
    def _smoothing_needs_data(self) -> Quantization:
        if self.effort == "datafree" and self.smoothing not in (None, "none"):
            raise PydanticCustomError(
                "at_key",
                "{smoothing} smoothing needs calibration, but effort datafree does not calibrate",
                {
                    "key": "smoothing",
                    "smoothing": self.smoothing,
                    "hint": "drop the key, or choose effort fast",
                },
            )
        return self

    @model_validator(mode="after")
    def _scales_are_searched_by_gptq(self) -> Quantization:
        if self.search is not None and "scales" in self.search and "gptq" not in self.search:
            raise PydanticCustomError(
                "at_key",
                "scales are searched within GPTQ, which is not in search",
                {"key": "search", "hint": "add gptq, or drop scales"},
            )
        return self

    @property
    def chosen_smoothing(self) -> Smoothing:
        """The recipe's word, else the effort's."""
        return self.smoothing or SMOOTHING_OF_EFFORT[self.effort]

    @property
    def chosen_search(self) -> tuple[SearchStep, ...]:
        """The recipe's word, else the effort's, in the order in which steps are taken."""
        wanted = STEPS_OF_EFFORT[self.effort] if self.search is None else self.search
        return tuple(step for step in ALL_STEPS if step in wanted)

    @property
    def size_bytes(self) -> int | None:
        """`size_budget` in bytes."""
        return None if self.size_budget is None else bytes_of_size(self.size_budget)

    @property
    def number_format(self) -> Precision:
        """The precision as the record that everything downstream matches on."""
        match self.precision:
            case "int4":
                return Int4()
            case "nvfp4":
                return NvFp4()


class RankOverride(Section):
    """Layers that get their own rank."""

    match: Pattern
    """Glob over layer names, for example transformer_blocks.*.ff.net.2."""
    rank: FixedRank


class KeepOverride(Section):
    """Layers that stay at 16 bits."""

    match: Pattern
    """Glob over layer names."""
    keep: Literal[True]


class SkipOverride(Section):
    """Modules whose layers all stay at 16 bits."""

    match: Pattern
    """Glob over module names, for example transformer_blocks.0."""
    skip: Literal[True]


class IncludeOverride(Section):
    """Layers to quantize although the family, or the model's structure, would not."""

    match: Pattern
    """Glob over layer names."""
    include: Literal["w4a4", "w4a16"]
    """w4a4 (weights and activations in 4 bits) or w4a16 (weights only, for modulation layers)."""


class GroupOverride(Section):
    """W4A4 layers that read the same activation: they share statistics and a smoothing factor."""

    match: Pattern
    """Glob over modules, for example transformer_blocks.*.attn; a star matches one part of a path."""
    group: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """Names of the layers within the module."""


_OVERRIDE_KINDS = ("rank", "keep", "skip", "include", "group")  # the key that tells them apart


def _override_kind(value: object) -> str:
    keys = (
        cast("dict[str, object]", value)
        if isinstance(value, dict)
        else type(cast("Section", value)).model_fields
    )
    return next((kind for kind in _OVERRIDE_KINDS if kind in keys), "rank")


_RULE_HINT = "write {match: ..., rank: 64}, or keep: true, skip: true, include: w4a4, group: [...]"


def _one_kind(value: object) -> object:
    if isinstance(value, dict):
        given = cast("dict[str, object]", value)
        unknown = [key for key in given if key not in ("match", *_OVERRIDE_KINDS)]
        if unknown:
            known = {"keys": unknown, "known": ["match", *_OVERRIDE_KINDS]}
            raise PydanticCustomError("unknown_keys", "unknown key", known)
        chosen = [kind for kind in _OVERRIDE_KINDS if kind in given]
        if len(chosen) != 1:
            said = f"has both {' and '.join(chosen)}" if chosen else "does not say what to do with the layers"
            raise PydanticCustomError("override", "the entry {said}", {"said": said, "hint": _RULE_HINT})
    elif not isinstance(value, Section):
        raise PydanticCustomError("override", "must be a section of keys and values", {"hint": _RULE_HINT})
    return cast(object, value)


LayerOverride = Annotated[
    Annotated[RankOverride, Tag("rank")]
    | Annotated[KeepOverride, Tag("keep")]
    | Annotated[SkipOverride, Tag("skip")]
    | Annotated[IncludeOverride, Tag("include")]
    | Annotated[GroupOverride, Tag("group")],
    Discriminator(_override_kind),
]


class Output(Section):
    """One file or folder to write."""

    format: OutputFormat = DEFAULT
    """Which runtime it is for: nunchaku-lite writes a diffusers pipeline folder, the others a single file."""
    path: Text | None = None
    """Path, relative to the current directory; absent if -o gives it."""


def _gates(value: object) -> tuple[Gate, ...]:
    """`{metric: condition}` as gates; gates as they are."""
    if isinstance(value, tuple):
        return cast("tuple[Gate, ...]", value)
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "must be a section")
    return tuple(_gate(metric, condition) for metric, condition in cast("dict[str, object]", value).items())


def _gate(metric: str, condition: object) -> Gate:
    try:
        return parse_gate(metric, str(condition))
    except UsageError as error:
        context = {"key": metric, "what": error.message, "hint": error.hint or ""}
        raise PydanticCustomError("at_key", "{what}", context) from error


def _gates_as_written(gates: tuple[Gate, ...]) -> dict[str, str]:
    return {gate.metric: gate.condition for gate in gates}


Gates = Annotated[
    tuple[Gate, ...],
    PlainValidator(_gates),
    PlainSerializer(_gates_as_written),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {metric: {"type": "string", "pattern": CONDITION_PATTERN} for metric in METRICS},
            "additionalProperties": False,
        }
    ),
]


def _components(value: object) -> object:
    """A list of names. A mapping of names to w4a16 says the same, as recipes did before there was nothing else."""
    if not isinstance(value, dict):
        return value
    named = cast("dict[object, object]", value)
    return list(named) if all(kind == "w4a16" for kind in named.values()) else named


Components = Annotated[
    tuple[Text, ...],
    Field(strict=False),
    BeforeValidator(_components),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "string"}},
                {"type": "object", "additionalProperties": {"const": "w4a16"}},
            ]
        }
    ),
]


class Recipe(Section):
    """A conversion: a model, its calibration and quantization, and the outputs."""

    version: Literal[1]
    """The version of the recipe format."""
    model: Model
    """The model to convert."""
    calibration: Calibration | None = None
    """Prompts for which the 16-bit model generates images, to record activations. Without: data-free, less accurate."""
    quantization: Quantization = Quantization()
    """The 4-bit format of the weights, and the effort of the search."""
    layers: Annotated[
        tuple[Annotated[LayerOverride, BeforeValidator(_one_kind)], ...], Field(strict=False)
    ] = ()
    """Layer rules, later ones win: {match: GLOB} with rank: 64, keep: true, skip: true, include: w4a4, group: [...]."""
    modulation: Literal["auto", "w4a16", "curve", "keep"] = "auto"
    """Modulation layers: w4a16, keep (16 bits), curve (where only the timestep enters), or auto: as measured."""
    components: Components = ()
    """Text encoders to store with 4-bit weights in a pipeline folder: [text_encoder, text_encoder_2]."""
    outputs: Annotated[tuple[Output, ...], Field(strict=False)] = ()
    """The outputs: {format, path}."""
    gates: Gates = ()
    """Conditions on metrics; a missed one ends with exit code 6. For example {psnr_db: ">= 20"}."""

    @model_validator(mode="after")
    def _outputs_are_apart(self) -> Recipe:
        paths = [output.path for output in self.outputs if output.path is not None]
        for index, path in enumerate(paths):
            if path in paths[:index]:
                context = {"key": "outputs", "path": path, "hint": "give every output its own path"}
                raise PydanticCustomError("at_key", "two outputs have the path {path}", context)
        return self


def _places(keys: Iterable[str]) -> dict[str, str]:
    """Where keys of another section belong: `{"rank": "quantization"}`, "" for the top of a recipe."""
    sections = {"": Recipe, "model": Model, "calibration": Calibration, "quantization": Quantization}
    return {key: name for key in keys for name, section in sections.items() if key in section.model_fields}


def default_recipe(
    source: str,
    *,
    calibration: Calibration | None = None,
    quantization: Quantization | None = None,
    outputs: Sequence[Output] = (),
) -> Recipe:
    """The recipe of a bare model; without `calibration` it is converted data-free. UsageError for a source that is no
    text at all."""
    try:
        model = Model(source=source)
    except ValidationError as error:
        problem = problems_of(error)[0]
        hint = problem.hint or "give a model's folder, file or Hub id"
        raise UsageError(f"SOURCE {problem.message}", hint=hint, where="SOURCE") from error
    return Recipe(
        version=1,
        model=model,
        calibration=calibration,
        quantization=quantization or Quantization(),
        outputs=tuple(outputs),
    )


def output_of(format: str, path: str | None) -> Output:
    """An output that the command line names; without a path, one that is only planned. Raises UsageError."""
    try:
        return Output.model_validate({"format": format, "path": path})
    except ValidationError as error:
        raise UsageError(
            f"-o {problems_of(error)[0].message}", hint="name a file or a folder", where="-o"
        ) from error


LORA_HINT = "write --lora FILE, --lora FILE:0.8 or, for one of two denoisers, --lora FILE:0.8:transformer_2"


def lora_of(path: str, weight: float = 1.0, component: str | None = None) -> Lora:
    """A LoRA that the command line names. Raises UsageError."""
    try:
        return Lora(path=path, weight=weight, component=component)
    except ValidationError as error:
        problem = problems_of(error)[0]
        named = f"--lora {path}: weight" if problem.location == ("weight",) else "--lora"
        raise UsageError(f"{named} {problem.message}", hint=LORA_HINT, where="--lora") from error


def resolved(recipe: Recipe) -> dict[str, object]:
    """The recipe as plain JSON with every default filled in; it parses back."""
    plain = recipe.model_dump(mode="json")
    plain["quantization"]["smoothing"] = recipe.quantization.chosen_smoothing
    plain["quantization"]["search"] = list(recipe.quantization.chosen_search)
    return plain


def embedded(recipe: Recipe, *, source: str) -> dict[str, object]:
    """What a checkpoint says about its making: `resolved` without `outputs`, `gates` and the base pipeline, which do
    not shape its bytes, with `source` for the model's name and without the LoRAs' folders. So the
    same conversion of the same weights is the same file, wherever and in whatever kind of file the source was
    stored."""
    kept = {key: value for key, value in resolved(recipe).items() if key not in ("outputs", "gates")}
    loras = [
        {"path": name, "weight": lora.weight, **({"component": lora.component} if lora.component else {})}
        for name, lora in zip(
            distinct_names([lora.path for lora in recipe.model.loras]), recipe.model.loras, strict=True
        )
    ]
    model = {**recipe.model.model_dump(mode="json"), "source": source, "base": None, "loras": loras}
    return {**kept, "model": model}


def json_schema() -> dict[str, object]:
    """The JSON Schema of a recipe, for editors (committed as configs/recipe.schema.json)."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**dialect, **Recipe.model_json_schema(), "title": "svdq recipe, version 1"}
