"""Model families as data, one file per family. To add one: write its constant, add it to `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.family import BlockRule, Family, InputRule
from svdq_cli.families.flux import FLUX

FAMILIES: tuple[Family, ...] = (FLUX,)

__all__ = ["FAMILIES", "BlockRule", "Family", "InputRule", "family_named", "family_of_config"]


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


def family_of_config(config: Mapping[str, object], *, where: str) -> Family:
    """The family of a diffusers model config, by `_class_name` or, where that is missing, by its keys.

    Raises InputError (kind `unknown-family`) naming the class and the families that are known.
    """
    class_name = config.get("_class_name")
    for family in FAMILIES:
        if class_name in family.classes:
            return family
        if class_name is None and family.config_signature <= config.keys():
            return family
    known = ", ".join(f"{family.name} ({', '.join(family.classes)})" for family in FAMILIES)
    raise InputError(
        f"{where}: no model family for {class_name or 'a config without _class_name'}",
        hint=f"this version knows {known}",
        where=where,
        kind="unknown-family",
    )
