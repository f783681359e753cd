"""YAML text -> plain values plus the line of every one of them, refusing what a recipe has no use for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import yaml
from yaml.parser import ParserError
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

from svdq_cli.errors import RecipeError
from svdq_cli.recipe.problems import Location

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d+")  # 1e-05 is a number in JSON, and text to PyYAML


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML file. `lines` has the 1-based line of every key and list item, `()` being the file itself."""

    content: object
    lines: Mapping[Location, int]
    where: str

    def inside(self, location: Location) -> Location:
        """The part of a location that exists in the file: parts that the text does not have are left out."""
        found: Location = ()
        for part in location:
            if (*found, part) in self.lines:
                found = (*found, part)
        return found

    def line(self, location: Location) -> int:
        return self.lines[self.inside(location)]


def read_document(text: str, where: str) -> Document:
    """Raises RecipeError for a syntax error, a key given twice, a tag, an alias, or a text too large or too deep."""
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(
            f"{where}: larger than {MAX_BYTES >> 20} MiB", hint="is this a recipe?", where=where
        )
    try:
        _refuse_cleverness(text, where)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            hint = "`svdq init SOURCE -o RECIPE.yaml` writes a complete one"
            raise _error(where, 1, "the recipe is empty", hint)
        lines: dict[Location, int] = {(): 1}
        return Document(_value(node, (), lines, loader, where), lines, where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.problem, error.context) if part)
        hint = _SYNTAX_HINT if isinstance(error, (ScannerError, ParserError)) else _WHOLE_HINT
        raise _error(where, mark.line + 1 if mark else 1, f"not YAML: {message}", hint) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _error(where, line, f"not YAML: {error.reason}", _WHOLE_HINT) from error


_WHOLE_HINT = "a recipe is one YAML document of plain text; `svdq init SOURCE -o RECIPE.yaml` writes one"
_SYNTAX_HINT = 'values that hold any of : # > { [ need quotes, like ">= 20"'


def _refuse_cleverness(text: str, where: str) -> None:
    """Aliases make small files huge, tags make objects; a recipe needs neither. Checked on the flat event stream,
    before anything recursive touches the text."""
    depth = 0
    for event in cast("Iterable[yaml.Event]", yaml.parse(text, Loader=yaml.SafeLoader)):  # pyright: ignore[reportUnknownMemberType]
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None):  # an alias carries the name of its anchor
            raise _error(where, line, "anchors and aliases are not supported", "write out the value")
        if tag := getattr(event, "tag", None):
            raise _error(where, line, f"the tag {tag!r} is not supported", "write the plain value")
        if isinstance(event, yaml.ScalarEvent) and any("\ud800" <= mark <= "\udfff" for mark in event.value):
            raise _error(where, line, "half a character (\\ud800 to \\udfff)", "write the whole character")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _error(where, line, f"nested deeper than {MAX_DEPTH} levels", "is this a recipe?")


def _value(
    node: yaml.Node, location: Location, lines: dict[Location, int], loader: yaml.SafeLoader, where: str
) -> object:
    """The plain value of a node; adds the lines of everything in it to `lines`."""
    line = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        items: list[object] = []
        for index, item in enumerate(node.value):
            lines[(*location, index)] = item.start_mark.line + 1
            items.append(_value(item, (*location, index), lines, loader, where))
        return items
    if isinstance(node, yaml.MappingNode):
        entries: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, where)
            spot = (*location, key)
            if key in entries:
                raise _error(
                    where,
                    key_node.start_mark.line + 1,
                    f"key {key!r} is given twice",
                    f"first in line {lines[spot]}",
                )
            lines[spot] = key_node.start_mark.line + 1
            entries[key] = _value(value_node, spot, lines, loader, where)
        return entries
    if node.tag == "tag:yaml.org,2002:timestamp":  # a date has no place in a recipe: it is a name
        return node.value
    if getattr(node, "style", None) is None and _SCIENTIFIC.fullmatch(node.value):
        return float(node.value)
    try:
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise _error(where, line, f"the value can't be read: {error}", None) from error


def _key(node: yaml.Node, where: str) -> str:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        return node.value
    shown = f"{node.value!r} is" if isinstance(node, yaml.ScalarNode) else "a list or section is"
    raise _error(
        where, node.start_mark.line + 1, f"{shown} not a valid key", "keys of a recipe must be words"
    )


def _error(where: str, line: int, message: str, hint: str | None) -> RecipeError:
    return RecipeError(f"{where}:{line}: {message}", hint=hint, where=f"{where}:{line}")
