"""YAML in, `Recipe` out, or an error that names file and line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from svdq_cli.errors import InputError, RecipeError
from svdq_cli.recipe.document import MAX_BYTES, Document, read_document
from svdq_cli.recipe.problems import Problem, problems_of
from svdq_cli.recipe.schema import Recipe


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file. Raises InputError (kind "not-found") when there is none, RecipeError when it is wrong."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # one byte too many is enough to be refused
        return parse_recipe(content.decode("utf-8-sig"), str(path))
    except FileNotFoundError as error:
        hint = f"`svdq init SOURCE -o {path}` writes one"
        raise InputError(f"no recipe {str(path)!r}", hint=hint, where=str(path), kind="not-found") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text", hint="is this a recipe?", where=str(path)) from error
    except OSError as error:
        raise InputError(
            f"can't read the recipe {str(path)!r}: {error.strerror}",
            hint="give a .yaml file that you may read",
            where=str(path),
        ) from error


def parse_recipe(text: str, where: str) -> Recipe:
    """Parses a recipe's text; `where` names it in messages. Raises RecipeError naming every wrong line."""
    document = read_document(text, where)
    try:
        return Recipe.model_validate(document.content)
    except ValidationError as error:
        raise _recipe_error(problems_of(error), document) from error


def at_its_rule(error: RecipeError, path: Path) -> RecipeError:
    """An error about a layer rule, which came up when the recipe at `path` met its model (`where` is the rule's
    pattern), with file and line. Any other error as it is."""
    document = read_document(path.read_text(encoding="utf-8-sig"), str(path))
    rules = Recipe.model_validate(document.content).layers
    for index, rule in enumerate(rules):
        if rule.match == error.where:
            spot = f"{path}:{document.line(('layers', index, 'match'))}"
            return RecipeError(f"{spot}: {error.message}", hint=error.hint, where=spot)
    return error


def _recipe_error(problems: list[Problem], document: Document) -> RecipeError:
    """All problems, top of the file first. One alone has its hint apart, several have theirs in the line."""
    problems = sorted(problems, key=lambda problem: document.line(problem.location))
    first = problems[0]
    spot = f"{document.where}:{document.line(first.location)}"
    if len(problems) == 1:
        return RecipeError(_sentence(first, document), hint=first.hint, where=spot)
    lines = [_sentence(p, document) + (f" ({p.hint})" if p.hint else "") for p in problems]
    return RecipeError("\n".join(lines), hint=None, where=spot)


def _sentence(problem: Problem, document: Document) -> str:
    """`file:line: unknown key 'smoth' in quantization`, `file:line: quantization.rank: must be ...`."""
    start = f"{document.where}:{document.line(problem.location)}: "
    at = document.inside(problem.location)
    if problem.message.startswith(("unknown key", "unknown metric")):
        return f"{start}{problem.message} in {_name(at[:-1]) or 'the recipe'}"
    if (
        at != problem.location
        and isinstance(problem.location[-1], str)
        and problem.message.endswith("is missing")
    ):
        return f"{start}{problem.message} in {_name(at) or 'the recipe'}"
    return f"{start}{_name(at)}: {problem.message}" if at else f"{start}{problem.message}"


def _name(location: Iterable[str | int]) -> str:
    """`("layers", 0, "rank")` as `layers[0].rank`."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name
