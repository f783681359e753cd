"""From what was typed to a recipe: a recipe file, or a bare model with defaults, with options put over either."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from svdq_cli.errors import RecipeError, UsageError
from svdq_cli.formats import format_named
from svdq_cli.locate import locate_file
from svdq_cli.placing import require_places
from svdq_cli.planning.inventory import Inventory
from svdq_cli.planning.rules import recipe_rules
from svdq_cli.planning.structure import STRUCTURAL
from svdq_cli.recipe import (
    Calibration,
    Lora,
    Output,
    Recipe,
    ShippedRecipe,
    at_its_rule,
    copied_text,
    default_recipe,
    load_recipe,
    lora_of,
    output_of,
    parse_fail_if,
    recipe_template,
    schema_address,
    shipped_recipe,
    shipped_recipes,
    user_path,
    with_overrides,
)
from svdq_cli.records import ModelPlan, ignore_events
from svdq_cli.writing import disk_errors, refuse_existing

if TYPE_CHECKING:
    from svdq_cli.preparing import RunOptions


@dataclass(frozen=True, slots=True)
class InitReport:
    path: str
    family: str
    command: str = "init"
    status: str = "ok"
    schema: int = 1


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    name: str
    about: str
    source: str
    precision: str
    effort: str
    output: str | None  # where it writes, from the current directory


@dataclass(frozen=True, slots=True)
class RecipesReport:
    """The recipes that ship with svdq."""

    recipes: tuple[RecipeFacts, ...]
    command: str = "recipes"
    status: str = "ok"
    schema: int = 1


def list_recipes() -> RecipesReport:
    """`svdq recipes`."""
    return RecipesReport(tuple(_facts_of(found) for found in shipped_recipes()))


def _facts_of(found: ShippedRecipe) -> RecipeFacts:
    recipe = load_recipe(found.path)
    wanted, outputs = recipe.quantization, recipe.outputs
    output = outputs[0].path if outputs else None
    return RecipeFacts(found.name, found.about, recipe.model.source, wanted.precision, wanted.effort, output)


def recipe_file(source: str) -> Path | None:
    """The recipe that SOURCE names, by its path or as one of those that ship with svdq; None for a model."""
    path = user_path(source)
    shipped = None if path.exists() else shipped_recipe(source)
    return shipped or (path if path.suffix.lower() in (".yaml", ".yml") else None)


def recipe_of(source: str) -> tuple[Recipe, Path | None]:
    """The recipe that SOURCE is or implies, and the folder its relative paths start from."""
    if path := recipe_file(source):
        return load_recipe(path), path.parent
    return default_recipe(source), None


@contextmanager
def rules_named(source: str) -> Generator[None, None, None]:
    """An error about a layer rule, which comes up when the recipe SOURCE meets its model, names file and line."""
    try:
        yield
    except RecipeError as error:
        path = recipe_file(source)
        named = at_its_rule(error, path) if path else error
        if named is error:
            raise
        raise named from error


def with_default_calibration(recipe: Recipe) -> Recipe:
    """The recipe, calibrated as suits its model where it says nothing of calibration."""
    if recipe.calibration is not None:
        return recipe
    return recipe.model_copy(update={"calibration": Calibration()})


def override(recipe: Recipe, given: Mapping[str, object]) -> Recipe:
    """Command-line options over the recipe: options win. `out`, `formats` and `fail_if` are the command line's own."""
    options = dict(given)
    out = cast("Path | None", options.pop("out", None))
    formats = cast("list[str] | None", options.pop("formats", None)) or []
    conditions = cast("list[str] | None", options.pop("fail_if", None)) or []
    if loras := cast("list[str] | None", options.pop("loras", None)):
        options["loras"] = (*recipe.model.loras, *(parse_lora(text) for text in loras))
    if options.get("prompts") is not None and recipe.calibration is None:
        recipe = with_default_calibration(recipe)
    if column := cast("str | None", options.pop("prompt_column", None)):
        options["prompts"] = _with_column(recipe, cast("str | None", options.get("prompts")), column)
    if out is not None or formats:
        options["outputs"] = _outputs(recipe, out, formats)
    recipe = with_overrides(recipe, **options)  # type: ignore[arg-type]
    gates = (*recipe.gates, *(parse_fail_if(condition) for condition in conditions))
    return recipe.model_copy(update={"gates": gates})


def _with_column(recipe: Recipe, given: str | None, column: str) -> dict[str, str | None]:
    """The prompts that are named, given or the recipe's, in a column of their own."""
    named = given or (recipe.calibration.prompts if recipe.calibration else None)
    match named:
        case None:
            raise UsageError(
                f"--prompt-column {column}: no prompts are named",
                hint="add --prompts FILE",
                where="--prompt-column",
            )
        case str(path):
            return {"dataset": path, "column": column}
        case data_set:
            return {**data_set.model_dump(), "column": column}


def refuse_unused_prompts(recipe: Recipe, prompts: str | None) -> None:
    """UsageError for prompts that were asked for in a conversion that would not look at them."""
    if prompts is not None and recipe.quantization.effort == "datafree":
        raise UsageError(
            f"--prompts {prompts}: effort datafree does not calibrate, and would not read them",
            hint="leave --prompts out, or choose --effort fast, balanced or best",
            where="--prompts",
        )


def _outputs(recipe: Recipe, out: Path | None, formats: list[str]) -> list[Output]:
    """What -o and --format make of the recipe's outputs. Several formats are named after one -o."""
    for name in formats:
        format_named(name)  # refuses an unknown one by name
    if len(set(formats)) < len(formats):
        raise UsageError("--format names one format twice", hint="name each format once")
    if len(recipe.outputs) > 1 and (out is not None or len(formats) != len(recipe.outputs)):
        raise UsageError(
            f"the recipe names {len(recipe.outputs)} outputs, and -o or --format would replace them",
            hint="leave the options out, or change outputs in the recipe",
        )
    named = recipe.outputs[0] if recipe.outputs else None
    path = str(out) if out is not None else named.path if named else None
    formats = formats or [named.format if named else "nunchaku-lite"]
    if len(formats) == 1 or path is None:
        return [output_of(name, path) for name in formats]
    paths = {
        name: f"{path}.{name}.safetensors" if format_named(name).single_file else path for name in formats
    }
    return [output_of(name, paths[name]) for name in formats]


def parse_lora(text: str) -> Lora:
    """`--lora PATH` or `--lora PATH:WEIGHT`. Raises UsageError for a weight that is no number."""
    path, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight:  # the colon of a drive, or of a folder's name
        return lora_of(text)
    try:
        strength = float(weight)
        if not path or not math.isfinite(strength):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--lora {text}: {weight!r} is not a weight",
            hint="write --lora FILE or --lora FILE:0.8",
            where="--lora",
        ) from error
    return lora_of(path, strength)


def lora_files(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """`--lora` options as files and weights. Files may be missing."""
    loras = [parse_lora(text) for text in texts]
    return [(locate_file(lora.path), lora.weight) for lora in loras]


def outputs_of(recipe: Recipe) -> tuple[Path, ...]:
    """Where the conversion goes. Raises UsageError when neither recipe nor command says."""
    paths = tuple(user_path(output.path) for output in recipe.outputs if output.path is not None)
    if not paths:
        raise UsageError("no output is named", hint="give -o OUT, or outputs with a path in the recipe")
    if len(paths) < len(recipe.outputs):
        index = [output.path for output in recipe.outputs].index(None)
        raise UsageError(
            f"outputs[{index}] ({recipe.outputs[index].format}) has no path",
            hint="give every output of the recipe its path: -o is for recipes with one output",
            where=f"outputs[{index}].path",
        )
    return paths


def require_convertible(recipe: Recipe, options: RunOptions) -> tuple[Path, ...]:
    """Refuses what a conversion would refuse before it reads a weight; returns its outputs. A model that has to be
    downloaded first is not looked at."""
    from svdq_cli.conversion.predicting import uses_prompts
    from svdq_cli.locate import hub_id
    from svdq_cli.preparing import chosen_prompts, prepare

    paths = outputs_of(recipe)
    if not options.resume:
        for path in paths:
            refuse_existing(path, overwrite=options.overwrite)
    if hub_id(recipe.model.source, beside=options.beside) is None:
        prepared = prepare(recipe, beside=options.beside)
        if uses_prompts(prepared, None):
            chosen_prompts(prepared.recipe, options, ignore_events)
    return paths


def write_recipe(source: str, out: Path, *, overwrite: bool, **options: object) -> InitReport:
    """`svdq init`: a complete commented recipe for a model that is really there."""
    from svdq_cli.preparing import RunOptions, prepare, source_of, with_model_sampling

    if out.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"{out}: a recipe's name ends in .yaml", hint=f"use -o {out}.yaml", where=str(out))
    given, ready = recipe_file(source), shipped_recipe(source)
    if given and (ready is None or any(value is not None for value in options.values())):
        raise UsageError(
            f"{given}: a recipe already",
            hint="give the model that it names, or edit this recipe",
            where=source,
        )
    refuse_existing(out, overwrite=overwrite)
    require_places([out], folders=[False], inputs=[], overwrite=overwrite)
    if ready is not None:
        _write(out, copied_text(ready))
        return InitReport(str(out), load_recipe(ready).model.family)
    recipe = override(with_default_calibration(default_recipe(source)), options)
    opened = source_of(recipe, RunOptions())
    output = Output(path=f"out/{_slug(source)}-{recipe.quantization.precision}")
    recipe = with_model_sampling(recipe.model_copy(update={"outputs": (output,)}), opened)
    prepared = prepare(recipe, source=opened)
    if prepared.plan.family == STRUCTURAL:
        recipe = _with_structure(recipe, prepared.plan, prepared.inventory)
    _write(out, recipe_template(recipe, schema=schema_address()))
    return InitReport(str(out), prepared.plan.family)


def _write(out: Path, text: str) -> None:
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)


def _with_structure(recipe: Recipe, plan: ModelPlan, inventory: Inventory) -> Recipe:
    """The recipe with the structural plan spelled out, to be edited."""
    model = recipe.model.model_copy(update={"family": STRUCTURAL})
    return recipe.model_copy(update={"model": model, "layers": recipe_rules(plan, inventory)})


def _slug(source: str) -> str:
    return Path(source).name.replace(":", "-").lower() or "model"
