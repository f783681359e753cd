"""From what was typed to a recipe: a recipe file, or a bare model with defaults, with options put over either."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.errors import RecipeError, UsageError
from svdq_cli.formats import DEFAULT, format_named
from svdq_cli.prepare.locate import locate_file
from svdq_cli.recipe import (
    LORA_HINT,
    Calibration,
    Lora,
    Output,
    Recipe,
    at_its_rule,
    default_recipe,
    load_recipe,
    lora_of,
    output_of,
    parse_fail_if,
    shipped_recipe,
    user_path,
    with_overrides,
)
from svdq_cli.source import is_denoiser


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
    """Command-line options over the recipe, by the recipe's keys: options win. Some values are in the command line's
    own words: `model.loras` and `gates` add to the recipe's, `calibration.prompts.column` goes with its prompts,
    `outputs.path` and `outputs.format` name its outputs."""
    values = dict(given)
    out = cast("Path | None", values.pop("outputs.path", None))
    formats = cast("list[str] | None", values.pop("outputs.format", None)) or []
    conditions = cast("list[str] | None", values.pop("gates", None)) or []
    if loras := cast("list[str] | None", values.pop("model.loras", None)):
        values["model.loras"] = (*recipe.model.loras, *(parse_lora(text) for text in loras))
    if values.get("calibration.prompts") is not None and recipe.calibration is None:
        recipe = with_default_calibration(recipe)
    if column := cast("str | None", values.pop("calibration.prompts.column", None)):
        prompts = cast("str | None", values.get("calibration.prompts"))
        values["calibration.prompts"] = _with_column(recipe, prompts, column)
    if out is not None or formats:
        values["outputs"] = _outputs(recipe, out, formats)
    recipe = with_overrides(recipe, values)
    gates = (*recipe.gates, *(parse_fail_if(condition) for condition in conditions))
    return recipe.model_copy(update={"gates": gates})


def _with_column(recipe: Recipe, given: str | None, column: str) -> dict[str, str | None]:
    """The prompts that are named, given or the recipe's, in a column of their own."""
    named = given or (recipe.calibration.prompts if recipe.calibration else None)
    match named:
        case None:
            raise UsageError(
                f"--prompt-column {column}: there is no --prompts",
                hint="add --prompts FILE",
                where="--prompt-column",
            )
        case str(path):
            return {"dataset": path, "column": column}
        case data_set:
            return {**data_set.model_dump(), "column": column}


def refuse_unused_prompts(recipe: Recipe, given: Mapping[str, object]) -> None:
    """UsageError for prompts that were asked for in a conversion that would not look at them."""
    prompts = given.get("calibration.prompts")
    if prompts is not None and recipe.quantization.effort == "datafree":
        raise UsageError(
            f"--prompts {prompts}: effort datafree does not calibrate, so they would not be used",
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
            f"the recipe names {len(recipe.outputs)} outputs, but -o or --format would replace them",
            hint="leave the options out, or change outputs in the recipe",
        )
    named = recipe.outputs[0] if recipe.outputs else None
    path = str(out) if out is not None else named.path if named else None
    formats = formats or [named.format if named else DEFAULT]
    if len(formats) == 1 or path is None:
        return [output_of(name, path) for name in formats]
    paths = {
        name: f"{path}.{name}.safetensors" if format_named(name).single_file else path for name in formats
    }
    return [output_of(name, paths[name]) for name in formats]


def parse_lora(text: str) -> Lora:
    """`--lora PATH[:WEIGHT][:COMPONENT]`. Raises UsageError for a weight that is not a number."""
    path, component = text, None
    if (last := _after_colon(path)) and is_denoiser(last):
        path, component = path.removesuffix(f":{last}"), last
    weight = _after_colon(path)
    if weight is None:
        return lora_of(path, component=component)
    path = path.removesuffix(f":{weight}")
    try:
        strength = float(weight)
        if not path or not math.isfinite(strength):
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--lora {text}: {weight!r} is not a weight", hint=LORA_HINT, where="--lora"
        ) from error
    return lora_of(path, strength, component)


def _after_colon(text: str) -> str | None:
    """What follows the last colon, unless that is the colon of a drive, of a folder's name or of the file's."""
    _, colon, last = text.rpartition(":")
    if not colon or "/" in last or "\\" in last or locate_file(text).exists():
        return None
    return last


def files_of_loras(loras: Sequence[Lora]) -> list[LoraFile]:
    """The LoRAs that a command names, from the current directory. Files may be missing."""
    return [LoraFile(locate_file(lora.path), lora.weight, lora.component) for lora in loras]


def outputs_of(recipe: Recipe) -> tuple[Path, ...]:
    """Where the conversion goes. Raises UsageError when neither recipe nor command says."""
    paths = tuple(user_path(output.path) for output in recipe.outputs if output.path is not None)
    if not paths:
        raise UsageError("no output is named", hint="give -o OUT, or outputs with a path in the recipe")
    if len(paths) < len(recipe.outputs):
        index = [output.path for output in recipe.outputs].index(None)
        raise UsageError(
            f"outputs[{index}] ({recipe.outputs[index].format}) has no path",
            hint="give every output in the recipe a path: -o is for recipes with one output",
            where=f"outputs[{index}].path",
        )
    return paths
