"""Model families as data, one file per family. To add one, write the file: every `Family` in a module here is known."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import ModuleType

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.family import BlockRule, Family, InputRule

__all__ = [
    "FAMILIES",
    "MODULES",
    "BlockRule",
    "Family",
    "InputRule",
    "family_named",
    "family_of_config",
    "find_family",
]


def _modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(__path__):
        if not found.ispkg:
            yield importlib.import_module(f"{__name__}.{found.name}")


def _families(module: ModuleType) -> tuple[Family, ...]:
    return tuple(value for value in vars(module).values() if isinstance(value, Family))


# By the name of the module, in alphabetical order
MODULES: Mapping[str, tuple[Family, ...]] = {
    module.__name__.rpartition(".")[2]: families for module in _modules() if (families := _families(module))
}
FAMILIES: tuple[Family, ...] = tuple(family for families in MODULES.values() for family in families)


def family_named(name: str) -> Family:
    """The family of that name. Raises UsageError with the nearest valid name."""
    for family in FAMILIES:
        if family.name == name:
            return family
    names = [family.name for family in FAMILIES]
    near = get_close_matches(name, names, n=1)
    raise UsageError(
        f"unknown model family {name!r}",
        hint=f"did you mean {near[0]!r}?" if near else f"known families: {', '.join(names)}",
        kind="unknown-family",
    )


def find_family(config: Mapping[str, object]) -> Family | None:
    """The family of a diffusers model config, by `_class_name` or, where that is missing, by its keys."""
    return next((family for family in FAMILIES if family.matches(config)), None)


def family_of_config(config: Mapping[str, object], *, where: str) -> Family:
    """`find_family`, or InputError (kind `unknown-family`) naming the class and the families that are known."""
    if family := find_family(config):
        return family
    class_name = config.get("_class_name")
    known = ", ".join(f"{family.name} ({family.classes[0]})" for family in FAMILIES)
    raise InputError(
        f"{where}: no model family for {class_name or 'a config without _class_name'}",
        hint=f"this version knows {known}",
        where=where,
        kind="unknown-family",
    )
