"""From what was typed to a recipe: a recipe file, or a bare model with defaults, with options put over either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from svdq_cli.checkpoint import disk_errors, refuse_existing
from svdq_cli.drawing import demo_calibration
from svdq_cli.errors import UsageError
from svdq_cli.formats import format_named
from svdq_cli.locate import DEMO_SOURCES
from svdq_cli.recipe import (
    Calibration,
    Output,
    Recipe,
    default_recipe,
    load_recipe,
    parse_fail_if,
    recipe_template,
    with_overrides,
)


@dataclass(frozen=True, slots=True)
class InitReport:
    path: str
    family: str
    command: str = "init"
    status: str = "ok"
    schema: int = 1


def recipe_of(source: str) -> tuple[Recipe, Path | None]:
    """The recipe that SOURCE is or implies, and the folder its relative paths start from."""
    path = Path(source).expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return load_recipe(path), path.parent
    return default_recipe(source), None


def with_default_calibration(recipe: Recipe) -> Recipe:
    """The recipe, calibrated with prompts that ship with svdq where it names none."""
    if recipe.calibration is not None:
        return recipe
    demo = recipe.model.source in DEMO_SOURCES
    default = demo_calibration() if demo else Calibration(prompts="calib_prompts/general.txt")
    return recipe.model_copy(update={"calibration": default})


def override(recipe: Recipe, given: Mapping[str, object]) -> Recipe:
    """Command-line options over the recipe: options win. `out`, `formats` and `fail_if` are the command line's own."""
    options = dict(given)
    out = cast("Path | None", options.pop("out", None))
    formats = cast("list[str] | None", options.pop("formats", None)) or []
    conditions = cast("list[str] | None", options.pop("fail_if", None)) or []
    if len(formats) > 1:
        raise UsageError(
            "several formats at once are not in this version", hint="run svdq convert once for each"
        )
    if options.get("prompts") is not None and recipe.calibration is None:
        recipe = with_default_calibration(recipe)
    if out is not None or formats:
        for name in formats:
            format_named(name)  # refuses an unknown one by name
        named = recipe.outputs[0] if recipe.outputs else None
        if out is None and named is None:
            output = Output(format=formats[0], path="unnamed")  # type: ignore[arg-type]  # pydantic checks it
        else:
            fmt = formats[0] if formats else named.format if named else "nunchaku-lite"
            output = Output(format=fmt, path=str(out or (named.path if named else "")))  # type: ignore[arg-type]
        options["outputs"] = [output]
    recipe = with_overrides(recipe, **options)  # type: ignore[arg-type]
    gates = (*recipe.gates, *(parse_fail_if(condition) for condition in conditions))
    return recipe.model_copy(update={"gates": gates})


def output_of(recipe: Recipe) -> Path:
    """Where the conversion goes. Raises UsageError when neither recipe nor command says."""
    if not recipe.outputs or recipe.outputs[0].path == "unnamed":
        raise UsageError("no output is named", hint="give -o OUT, or outputs in the recipe")
    return Path(recipe.outputs[0].path).expanduser()


def write_recipe(source: str, out: Path, *, overwrite: bool, **options: object) -> InitReport:
    """`svdq init`: a complete commented recipe for a model that is really there."""
    from svdq_cli.preparing import RunOptions, draw_settings, prepare, source_of

    refuse_existing(out, overwrite=overwrite)
    recipe = override(with_default_calibration(default_recipe(source)), options)
    settings = draw_settings(recipe, source_of(recipe, RunOptions()))
    assert recipe.calibration is not None
    recipe = recipe.model_copy(
        update={
            "calibration": recipe.calibration.model_copy(
                update={"height": settings.height, "width": settings.width}
            ),
            "outputs": (Output(path=f"out/{_slug(source)}-{recipe.quantization.precision}"),),
        }
    )
    prepared = prepare(recipe)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(recipe_template(recipe), encoding="utf-8")
        partial.replace(out)
    return InitReport(str(out), prepared.plan.family)


def _slug(source: str) -> str:
    return Path(source).name.replace(":", "-").lower() or "model"
