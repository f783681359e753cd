"""A recipe with values put over it, by the recipe's own keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from pydantic import ValidationError

from svdq_cli.errors import UsageError
from svdq_cli.recipe.problems import problems_of
from svdq_cli.recipe.schema import Recipe


def with_overrides(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    """The recipe with values over its own, by key: `{"quantization.rank": 48, "outputs": [Output(path="out")]}`. None
    is a value that was not given.

    "calibration.prompts", a file or {dataset, column}, gives a recipe without calibration one. Effort `datafree` also
    drops the recipe's own smoothing. Raises UsageError, which names the last part of a key as an option: --rank.
    """
    given = {key: value for key, value in values.items() if value is not None}
    if recipe.calibration is None and "calibration.prompts" not in given:
        unused = [key for key in given if key.startswith("calibration.")]
        # The seed of a search is one of calibration too, where there is any.
        if refused := [option_of(key) for key in unused if key != "calibration.seed"]:
            raise UsageError(f"{', '.join(refused)}: these options need --prompts", hint="add --prompts FILE")
        given = {key: value for key, value in given.items() if key not in unused}
    if given.get("quantization.effort") == "datafree":
        given = {"quantization.smoothing": None, **given}
    plain = recipe.model_dump()
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        if section:
            inner = cast("dict[str, object]", plain.get(section) or {})
            plain[section] = {**inner, name: value}
        else:
            plain[name] = value
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise _option_error(error) from error


def option_of(key: str) -> str:
    """What the command line calls a key of the recipe: --batch-size for calibration.batch_size."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def _option_error(error: ValidationError) -> UsageError:
    problem = problems_of(error)[0]
    names: Iterable[str] = (
        part for part in reversed(problem.location) if isinstance(part, str) and part.isidentifier()
    )
    option = option_of(next(iter(names), "?"))
    return UsageError(f"{option}: {problem.message}", hint=problem.hint, where=option)
