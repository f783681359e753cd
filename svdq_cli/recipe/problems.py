"""What pydantic finds wrong with a recipe, in words for the person who wrote it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: where (keys and list positions), what, and what to do about it."""

    location: Location
    message: str
    hint: str | None = None


def problems_of(error: ValidationError) -> list[Problem]:
    """Everything pydantic found, one problem per wrong key."""
    return [problem for details in error.errors() for problem in _problems(details)]


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint of a misspelt name: the nearest valid one, else all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _moved(key: str, section: str) -> str:
    """The hint of a key that stands in the wrong section."""
    return (
        f"put {key!r} into {section!r}"
        if section
        else f"put {key!r} at the top of the recipe, outside of sections"
    )


def _problems(details: ErrorDetails) -> list[Problem]:
    location, context = _without_tag(details["loc"]), details.get("ctx", {})
    match details["type"]:
        case "unknown_keys":  # raised by model.Section
            known = cast("list[str]", context["known"])
            keys = cast("list[str]", context["keys"])
            places = cast("dict[str, str]", context.get("elsewhere", {}))
            hints = {key: _moved(key, places[key]) if key in places else nearest(key, known) for key in keys}
            return [Problem((*location, key), f"unknown key {key!r}", hints[key]) for key in keys]
        case "missing":
            return [_missing(location)]
        case "at_key":  # raised by a validator that looks at a whole section
            return [Problem((*location, str(context["key"])), details["msg"], context.get("hint"))]
        case "literal_error":
            valid = re.findall(r"'([^']*)'", str(context["expected"])) or [str(context["expected"]).lower()]
            return [Problem(location, *_not_one_of(details["input"], valid))]
        case _:
            return [Problem(location, _wrong_value(details), context.get("hint") or _hint(details))]


def _without_tag(location: Location) -> Location:
    """pydantic puts the kind of a layer rule between its place and its key: layers[0].rank.match."""
    return (*location[:2], *location[3:]) if location[:1] == ("layers",) and len(location) > 3 else location


def _missing(location: Location) -> Problem:
    if location == ("version",):
        return Problem(location, "the recipe has no 'version'", "add the line: version: 1")
    return Problem(location, f"{str(location[-1])!r} is missing")


def _not_one_of(value: object, valid: list[str]) -> tuple[str, str]:
    hint = nearest(value, valid) if isinstance(value, str) else f"known: {', '.join(valid)}"
    if isinstance(value, str) and value in valid:
        hint = f"write {value} without quotes"
    return f"must be {' or '.join(valid)}, not {_shown(value)}", hint


_HINTS = {
    "string_too_long": "is this the intended value?",
    "string_unicode": "rename the file, or give another",
    "int_type": "write it like 20, without quotes or a fraction",
    "int_from_float": "write it like 20, without quotes or a fraction",
    "float_type": "write it like 3.5, without quotes",
    "finite_number": "write it like 3.5",
    "string_type": "quotes make text of a number or of yes and no: '20'",
    "string_too_short": "give a value, or leave the key out",
    "bool_type": "write true or false, without quotes",
    "tuple_type": "write [a, b], or a line with - for each item",
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"),
        "write key: value in lines of their own below it, or leave it out",
    ),
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
}


def _hint(details: ErrorDetails) -> str | None:
    """What to write instead, for a value of a wrong type or out of its range."""
    context = details.get("ctx", {})
    match details["type"]:
        case "greater_than_equal" | "less_than_equal" as kind:
            return f"for example {_number(context['ge' if kind == 'greater_than_equal' else 'le'])}"
        case "greater_than":
            return f"for example {_number(context['gt'] + 1)}"
        case "multiple_of":
            return f"for example {', '.join(_number(context['multiple_of'] * times) for times in (1, 2, 4))}"
        case kind:
            return _HINTS.get(kind)


def _wrong_value(details: ErrorDetails) -> str:
    context, value = details.get("ctx", {}), _shown(details["input"])
    match details["type"]:
        case "greater_than_equal":
            return f"must be {_number(context['ge'])} or more, not {value}"
        case "greater_than":
            return f"must be above {_number(context['gt'])}, not {value}"
        case "less_than_equal":
            return f"must be {_number(context['le'])} or less, not {value}"
        case "multiple_of":
            return f"must be a multiple of {context['multiple_of']}, not {value}"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters, not {len(str(details['input']))}"
        case "string_too_short":
            return "must not be empty"
        case "string_unicode":
            return f"must be UTF-8 text, not {details['input']!a}"
        case kind if kind in _TYPES:
            return f"must be {_TYPES[kind]}, not {value}"
        case _:
            return details["msg"]


def _number(bound: object) -> str:
    """1000 for the bound 1000.0."""
    return str(int(bound) if isinstance(bound, float) and bound.is_integer() else bound)


def _shown(value: object) -> str:
    """A value as its writer knows it, in YAML's words."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a section"
        case list() | tuple():
            return "a list"
        case _:
            text = repr(value)
            return text if len(text) <= 60 else text[:57] + "..."
