"""`svdq init`: the recipes that ship with svdq, and a new recipe for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.errors import UsageError
from svdq_cli.planning.inventory import Inventory
from svdq_cli.planning.rules import recipe_rules
from svdq_cli.planning.structure import STRUCTURAL
from svdq_cli.recipe import (
    Output,
    Recipe,
    ShippedRecipe,
    copied_text,
    default_recipe,
    load_recipe,
    recipe_template,
    schema_address,
    shipped_recipe,
    shipped_recipes,
)
from svdq_cli.records import ModelPlan
from svdq_cli.storage.atomic import disk_errors, refuse_existing, write_text
from svdq_cli.storage.output_paths import require_places
from svdq_cli.text import bare_name

if TYPE_CHECKING:
    pass
from svdq_cli.prepare.from_command_line import override, recipe_file, with_default_calibration


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


def write_recipe(source: str, out: Path, options: Mapping[str, object], *, overwrite: bool) -> InitReport:
    """`svdq init`: a complete commented recipe for a model that is really there. `options`: what was typed, by the
    recipe's keys."""
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.prepare.prepare import prepare
    from svdq_cli.prepare.sampling import with_model_sampling
    from svdq_cli.prepare.sources import source_of

    if out.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(
            f"{out}: a recipe's name must end in .yaml", hint=f"use -o {out}.yaml", where=str(out)
        )
    given, ready = recipe_file(source), shipped_recipe(source)
    if given and (ready is None or options):
        raise UsageError(
            f"{given}: already a recipe",
            hint="give the model it names, or edit this recipe",
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
        write_text(out, text)


def _with_structure(recipe: Recipe, plan: ModelPlan, inventory: Inventory) -> Recipe:
    """The recipe with the structural plan spelled out, to be edited."""
    model = recipe.model.model_copy(update={"family": STRUCTURAL})
    return recipe.model_copy(update={"model": model, "layers": recipe_rules(plan, inventory)})


def _slug(source: str) -> str:
    return bare_name(source).replace(":", "-").lower() or "model"
