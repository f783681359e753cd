"""Model families as data, one file per family. To add one: write its constant, add it to `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.family import BlockRule, Family, InputRule
from svdq_cli.families.flux import FLUX
from svdq_cli.families.flux2 import FLUX2
from svdq_cli.families.pixart import PIXART
from svdq_cli.families.qwen_image import QWEN_IMAGE
from svdq_cli.families.sana import SANA
from svdq_cli.families.sd3 import SD3
from svdq_cli.families.stable_diffusion import SD15, SDXL
from svdq_cli.families.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (FLUX, FLUX2, SDXL, SD15, SD3, PIXART, SANA, QWEN_IMAGE, Z_IMAGE)

__all__ = ["FAMILIES", "BlockRule", "Family", "InputRule", "family_named", "family_of_config", "find_family"]


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
