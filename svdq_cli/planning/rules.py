"""A plan written as a recipe's layer rules, for `svdq init`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from svdq_cli.planning.inventory import Inventory
from svdq_cli.recipe import (
    GroupOverride,
    IncludeOverride,
    KeepOverride,
    LayerOverride,
)
from svdq_cli.records import ModelPlan
from svdq_cli.source import is_expert

Role = Literal["w4a4", "w4a16", "kept"]


def recipe_rules(plan: ModelPlan, inventory: Inventory) -> tuple[LayerOverride, ...]:
    """What a plan says of every layer, as rules to edit: which layers are quantized and how, which share an input,
    which stay at 16 bits. Layers at the same place of every block, and the
    experts of a stack, are one rule."""
    roles: dict[str, Role] = {linear.name: "kept" for linear in inventory.linears}
    roles |= {layer.name: "w4a4" for layer in plan.w4a4}
    roles |= {layer.name: "w4a16" for layer in plan.w4a16}
    included = [
        IncludeOverride(match=pattern, include=role)
        for role in ("w4a4", "w4a16")
        for pattern in _patterns(roles, role, inventory.stacks)
    ]
    kept = [KeepOverride(match=pattern, keep=True) for pattern in _patterns(roles, "kept", inventory.stacks)]
    return (*included, *_groups(plan, roles, inventory.stacks), *kept)


def _patterns(roles: Mapping[str, Role], role: Role, stacks: Sequence[str]) -> list[str]:
    """Patterns that match the layers of one role and no others."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, found in roles.items():
        if found == role:
            place = _any_block(name, stacks)
            every = f"{place.rpartition('.')[0]}.*" if is_expert(name) else place
            places[every].append(name)
    patterns: list[str] = []
    for pattern, names in places.items():
        exact = all(found == role for name, found in roles.items() if fnmatchcase(name, pattern))
        patterns += [pattern] if exact else names
    return patterns


def _groups(plan: ModelPlan, roles: Mapping[str, Role], stacks: Sequence[str]) -> list[GroupOverride]:
    """The W4A4 inputs that several layers read, one rule for all blocks."""
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for shared in plan.inputs:
        if len(shared.layers) > 1 and all(roles[name] == "w4a4" for name in shared.layers):
            module = _common_module(shared.layers)
            names = tuple(name[len(module) + 1 :] for name in shared.layers)
            found[_any_block(module, stacks), names] = None
    return [GroupOverride(match=pattern, group=names) for pattern, names in found]


def _common_module(names: Sequence[str]) -> str:
    """The deepest module that holds all of the layers."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(path) > depth and path[depth] == parts[0][depth] for path in parts):
        depth += 1
    return ".".join(parts[0][:depth])


def _any_block(name: str, stacks: Sequence[str]) -> str:
    """The name with the number of its block as a star: blocks.3.attn.to_q -> blocks.*.attn.to_q."""
    for stack in stacks:
        if name.startswith(stack + "."):
            _, *rest = name[len(stack) + 1 :].split(".")
            return ".".join([stack, "*", *rest])
    return name
