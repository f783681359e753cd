"""Decide what becomes of every linear layer, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from svdq_cli.errors import InputError, RecipeError
from svdq_cli.families import Family, family_named, find_family
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.planning.idle import idle_layers
from svdq_cli.planning.inventory import Inventory, empty_model, model_config, take_inventory
from svdq_cli.planning.matching import require_own_tensors
from svdq_cli.planning.structure import (
    STRUCTURAL,
    Reading,
    Roles,
    joined_roles,
    shared_input,
    structural_roles,
)
from svdq_cli.recipe import (
    GroupOverride,
    IncludeOverride,
    KeepOverride,
    LayerOverride,
    RankOverride,
    SkipOverride,
)
from svdq_cli.records import (
    LayerPlan,
    Linear,
    ModelPlan,
    Precision,
    RotatedPlan,
    Scheme,
    SharedInput,
    W4A4Plan,
    W4A16Plan,
)
from svdq_cli.source import Source, denoisers_of, is_expert, prefix_of

__all__ = [
    "Inventory",
    "plan_model",
    "restricted",
    "take_inventory",
    "watch_denoisers",
]


BY_RULE = "a rule of the recipe keeps it"

# What the layers of each denoiser read, by component; None where no forward pass showed it
Readings = Mapping[str, Mapping[str, Reading] | None]


def plan_model(
    source: Source,
    *,
    precision: Precision,
    rank: int,
    scheme: Scheme = "branch",
    family: str = "auto",
    overrides: Sequence[LayerOverride] = (),
    supports: Callable[[LayerPlan], str | None],
    keeps_modulation: bool = False,
    calibrated_with: Set[str] | None = None,
    readings: Readings | None = None,
) -> ModelPlan:
    """The plan of one model. A model without a family file, or `family` "structural", gets a structural plan.

    `scheme`: how layers with 4-bit activations are stored; without a branch no rank is used.
    `overrides`: the recipe's layer rules, in their order.
    `keeps_modulation`: layers that would be W4A16 stay at 16 bits, but for those that a rule includes.
    `calibrated_with`: the inputs besides a prompt that calibration gives the pipeline; layers that run only with others
    stay at 16 bits, but for those that a rule includes. None without calibration.
    `supports` is the output format's say: None, or why it can't hold a layer; such a layer is kept at 16 bits. Experts
    that no W4A4 layer of the format fits become W4A16: they are most of a model's weights, and only svdq runs them.
    `readings`: what a structural plan rests on; without it, what `watch_denoisers` sees.
    Raises InputError when names and rules disagree, RecipeError for an override that matches nothing.
    """
    known = _family_of(source, family)
    inventory = take_inventory(source, known)
    require_own_tensors(source, inventory)
    if readings is None:
        readings = watch_denoisers(source, family)
    roles = _roles(source, family, readings)
    unmodulated = sorted(roles.w4a16) if keeps_modulation else []
    idle = {} if calibrated_with is None else idle_layers(source, roles.quantized, calibrated_with)
    before = _without(roles, [*unmodulated, *idle])
    roles = _with_rules(before, inventory, overrides)
    exceptions = [rule for rule in overrides if isinstance(rule, RankOverride | KeepOverride)]
    skipped = before.quantized - roles.quantized
    because = {
        **dict.fromkeys(unmodulated, "the recipe keeps modulation"),
        **idle,
        **dict.fromkeys(skipped, BY_RULE),
        **roles.kept,
    }
    decided = _decided(inventory, roles, exceptions, because, rank, precision, scheme, supports)
    if not decided.layers:
        raise _nothing_fits(str(source.path), known, decided.unsupported)
    planned = {layer.name for layer in decided.layers}
    return ModelPlan(
        family=known.name if known else STRUCTURAL,
        model_class=inventory.model_class,
        components=source.components,
        parameters=inventory.parameters,
        layers=tuple(decided.layers),
        kept=tuple(decided.kept),
        by_names=roles.by_names,
        kept_because=decided.kept_because,
        inputs=tuple(shared for group in roles.inputs if (shared := _only(group, planned)) is not None),
    )


def _wanted(linear: Linear, roles: Roles, branched: W4A4Plan, scheme: Scheme) -> LayerPlan | None:
    """What a layer's role makes of it, None for one that stays at 16 bits. `branched`: a W4A4 layer with a branch."""
    if linear.name in roles.w4a4:
        match scheme:
            case "branch":
                return branched
            case "rotation":
                return RotatedPlan.of(linear)
            case "smoothing":
                return replace(branched, rank=0)
    return W4A16Plan(linear) if linear.name in roles.w4a16 else None


def _nothing_fits(where: str, family: Family | None, unsupported_reasons: Sequence[str]) -> InputError:
    """The error for a model of which no layer becomes 4-bit, with what its user can do."""
    others = [layout.format for layout in LAYOUTS if family and layout.family == family.name]
    if not unsupported_reasons:
        hint = "name layers with include rules in the recipe"
    elif others:
        hint = f"--format {others[0]} has a place for them"
    else:
        hint = "no output format of svdq has a place for layers of these sizes: this model stays as it is"
    return InputError(
        f"{where}: nothing to quantize: no layer of this model fits the output format"
        + (f" ({unsupported_reasons[0]})" if unsupported_reasons else ""),
        hint=hint,
        where=where,
    )


@dataclass(frozen=True, slots=True)
class _Decided:
    """Every linear of a model, quantized or kept. `unsupported`: "layer: why" of those that the format can't hold."""

    layers: list[LayerPlan]
    kept: list[Linear]
    kept_because: dict[str, str]
    unsupported: list[str]


def _decided(
    inventory: Inventory,
    roles: Roles,
    exceptions: Sequence[RankOverride | KeepOverride],
    because: Mapping[str, str],
    rank: int,
    precision: Precision,
    scheme: Scheme,
    supports: Callable[[LayerPlan], str | None],
) -> _Decided:
    """What becomes of each linear by its role, the recipe's exceptions and what the format can hold. `because`: why
    some are kept already."""
    decided = _Decided([], [], {}, [])
    for linear in inventory.linears:
        override = _override_for(linear.name, exceptions)
        own_rank = override.rank if isinstance(override, RankOverride) else rank
        wanted = _wanted(linear, roles, W4A4Plan(linear, precision, own_rank), scheme)
        refusal = supports(wanted) if wanted else None
        if refusal and (expert := _as_expert(linear, supports)):
            wanted, refusal = expert, None
        if refusal:
            decided.unsupported.append(f"{linear.name}: {refusal}")
        kept_by_rule = BY_RULE if isinstance(override, KeepOverride) else None
        reason = refusal or kept_by_rule
        if wanted is not None and reason is None:
            decided.layers.append(wanted)
            continue
        decided.kept.append(linear)
        if why := reason or because.get(linear.name):
            decided.kept_because[linear.name] = why
    return decided


def _as_expert(linear: Linear, supports: Callable[[LayerPlan], str | None]) -> LayerPlan | None:
    """An expert that the format can hold with 4-bit weights alone; None for any other layer."""
    plan = W4A16Plan(linear)
    return plan if is_expert(linear.name) and supports(plan) is None else None


def watch_denoisers(source: Source, family: str = "auto") -> dict[str, Mapping[str, Reading] | None]:
    """What the layers of every denoiser without a family file read, by component: seen in one forward pass of an empty
    model with arguments made up from its signature, None where no such call works.

    Of denoisers of one class and config the first is run.
    """
    from svdq_cli.planning.trace_inputs import watch

    parts = {config: part for config, part in reversed(_structural(source, family))}
    return {part.component: watch(empty_model(part, None)) for part in parts.values()}


def _structural(source: Source, family: str) -> list[tuple[tuple[str, str], Source]]:
    """The denoisers without a family file, each alone, with their class and config."""
    parts = denoisers_of(source)
    return [(model_config(part, None), part) for part in parts if _family_of(part, family) is None]


def _roles(source: Source, family: str, readings: Readings) -> Roles:
    """Roles of every denoiser's layers, under their joint names. Denoisers of one class and config have the same."""
    known: dict[tuple[str, str], Roles] = {}
    found = Roles(frozenset(), frozenset(), ())
    for part in denoisers_of(source):
        own = _family_of(part, family)
        config = model_config(part, own)
        if config not in known:
            inventory = take_inventory(part, own)
            known[config] = (
                _resolve_rules(own, inventory, str(part.path))
                if own
                else structural_roles(inventory, readings.get(part.component))
            )
        found = joined_roles(found, known[config], prefix_of(source.components, part.component))
    return found


def _family_of(source: Source, wanted: str) -> Family | None:
    """The family's rules; None for a structural plan."""
    match wanted:
        case "auto":
            return find_family(source.config)
        case "structural":
            return None
        case name:
            return family_named(name)


# ------------------------------------------------------------------------------------------------- a family's rules


def _resolve_rules(family: Family, inventory: Inventory, where: str) -> Roles:
    """Rules against names: every rule must match, every linear must be spoken of."""
    names = [linear.name for linear in inventory.linears]
    present = set(names)
    inputs: list[SharedInput] = []
    modulation: list[tuple[str, ...]] = [(name,) for name in family.w4a16]
    unmatched: list[str] = []
    for block in family.blocks:
        prefixes = block_prefixes(names, block.stack)
        if not prefixes and not block.optional:
            unmatched.append(f"{block.stack}.0")
        for prefix in prefixes:
            for rule in block.w4a4:
                full = tuple(f"{prefix}.{layer}" for layer in rule.layers)
                if rule.optional and present.isdisjoint(full):
                    continue
                branches = tuple(tuple(f"{prefix}.{layer}" for layer in part) for part in rule.branches)
                inputs.append(SharedInput(full[0], full, branches))
        modulation += [tuple(f"{prefix}.{layer}" for prefix in prefixes) for layer in block.w4a16 if prefixes]
    w4a4 = {name for shared in inputs for name in shared.layers}
    w4a16 = {name for group in modulation for name in group}
    unmatched += sorted((w4a4 | w4a16) - present)
    if unmatched:
        raise InputError(
            f"{where}: the rules of family {family.name!r} name {len(unmatched)} layers that this model does not have: "
            f"{', '.join(unmatched[:3])}",
            hint="an unknown variant of the family; --family structural chooses its layers from the module structure",
            where=unmatched[0],
            kind="unknown-family",
        )
    spoken = w4a4 | w4a16
    silent = [n for n in names if n not in spoken and not any(fnmatchcase(n, p) for p in family.keep)]
    if silent:
        raise InputError(
            f"{where}: no rule of family {family.name!r} covers {len(silent)} linear layers: "
            f"{', '.join(silent[:3])}",
            hint="an unknown variant of the family; --family structural chooses its layers from the module structure",
            where=silent[0],
            kind="unknown-family",
        )
    return Roles(frozenset(w4a4), frozenset(w4a16), (*inputs, *(shared_input(list(g)) for g in modulation)))


def block_prefixes(names: list[str], stack: str) -> list[str]:
    """The paths of a stack's blocks, in order: transformer_blocks.0, transformer_blocks.1, ... `*` in `stack` matches
    for one part of a path."""
    wanted = stack.split(".")
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False)):
            found[".".join(parts[: len(wanted) + 1])] = None
    return list(found)


# ------------------------------------------------------------------------------------------------- a recipe's rules


def _with_rules(roles: Roles, inventory: Inventory, rules: Sequence[LayerOverride]) -> Roles:
    """The family's (or the structure's) roles with the recipe's rules over them, in the order they are written."""
    for rule in rules:
        match rule:
            case IncludeOverride():
                roles = _included(roles, _matched(rule.match, inventory, "no linear layer"), rule.include)
            case SkipOverride():
                roles = _without(roles, _matched_modules(rule.match, inventory))
            case GroupOverride():
                roles = _grouped(roles, rule, inventory)
            case RankOverride():
                quantized = [*roles.w4a4, *roles.w4a16]
                _require_match(rule.match, quantized, "no quantized layer")
            case KeepOverride():  # may also say of a layer that it stays as it is
                _require_match(rule.match, [linear.name for linear in inventory.linears], "no linear layer")
    return roles


def _included(roles: Roles, names: list[str], role: Literal["w4a4", "w4a16"]) -> Roles:
    new = [name for name in names if name not in (roles.w4a4 if role == "w4a4" else roles.w4a16)]
    base = _without(roles, new)
    inputs = (*base.inputs, *(shared_input([name]) for name in new))
    if role == "w4a4":
        return replace(base, w4a4=base.w4a4.union(new), inputs=inputs)
    return replace(base, w4a16=base.w4a16.union(new), inputs=inputs)


def _without(roles: Roles, names: list[str]) -> Roles:
    gone = set(names)
    inputs = tuple(left for shared in roles.inputs if (left := _only(shared, set(shared.layers) - gone)))
    return replace(roles, w4a4=roles.w4a4 - gone, w4a16=roles.w4a16 - gone, inputs=inputs)


def _grouped(roles: Roles, rule: GroupOverride, inventory: Inventory) -> Roles:
    """The group's layers out of their inputs and into one of their own, in every module that matches."""
    sizes = {linear.name: linear.in_features for linear in inventory.linears}
    modules = [
        m for m in _modules(inventory) if fnmatchcase(m, rule.match) and m.count(".") == rule.match.count(".")
    ]
    named = [[f"{module}.{layer}" for layer in rule.group] for module in modules]
    groups = [names for names in named if all(name in sizes for name in names)]
    quantized = [names for names in groups if not roles.w4a4.isdisjoint(names)]  # other blocks may be skipped
    if not groups:
        raise RecipeError(
            f"layers: no module {rule.match!r} holds all of {', '.join(rule.group)}",
            hint="match names the module, group its layers: {match: blocks.*.attn, group: [to_q, to_k, to_v]}",
            where=rule.match,
        )
    for names in quantized or groups:
        if not set(names) <= roles.w4a4:
            raise _no_group(names, rule, "not all of them are W4A4")
        if len({sizes[name] for name in names}) > 1:
            raise _no_group(names, rule, "their input sizes differ")
        rest = tuple(left for s in roles.inputs if (left := _only(s, set(s.layers) - set(names))))
        roles = replace(roles, inputs=(*rest, shared_input(names)))
    return roles


def _no_group(names: list[str], rule: GroupOverride, why: str) -> RecipeError:
    return RecipeError(
        f"layers: {', '.join(names)} can't share an input: {why}",
        hint="group only W4A4 layers that read the same activation; include layers that are kept first",
        where=rule.match,
    )


def _modules(inventory: Inventory) -> list[str]:
    """Every module that holds a linear layer, at any depth."""
    found: dict[str, None] = {}
    for linear in inventory.linears:
        parts = linear.name.split(".")
        found |= {".".join(parts[:depth]): None for depth in range(1, len(parts))}
    return list(found)


def _matched(pattern: str, inventory: Inventory, what: str) -> list[str]:
    names = [linear.name for linear in inventory.linears]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise _matches_nothing(pattern, names, what)
    return found


def _matched_modules(pattern: str, inventory: Inventory) -> list[str]:
    """Every linear in a module that matches, or that matches itself."""
    modules = {m for m in _modules(inventory) if fnmatchcase(m, pattern)}
    names = [linear.name for linear in inventory.linears]
    found = [
        name
        for name in names
        if fnmatchcase(name, pattern) or any(name.startswith(f"{module}.") for module in modules)
    ]
    if not found:
        raise _matches_nothing(pattern, [*_modules(inventory), *names], "no module")
    return found


def _override_for(
    name: str, overrides: Sequence[RankOverride | KeepOverride]
) -> RankOverride | KeepOverride | None:
    """The last override that matches wins, as in a list of exceptions."""
    return next((o for o in reversed(overrides) if fnmatchcase(name, o.match)), None)


def _require_match(pattern: str, names: list[str], what: str) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise _matches_nothing(pattern, names, what)


def _matches_nothing(pattern: str, names: list[str], what: str) -> RecipeError:
    near = get_close_matches(pattern, names, n=1, cutoff=0.3)
    return RecipeError(
        f"layers: the pattern {pattern!r} matches {what}",
        hint=f"the nearest name is {near[0]}" if near else "svdq inspect lists the layers",
        where=pattern,
    )


def _only(shared: SharedInput, planned: set[str]) -> SharedInput | None:
    """A shared input without the layers that are kept after all. Its name stays, by which calibrations know it."""
    layers = tuple(name for name in shared.layers if name in planned)
    if not layers:
        return None
    branches = (tuple(name for name in part if name in planned) for part in shared.branches)
    return SharedInput(shared.name, layers, tuple(part for part in branches if part))


def restricted(plan: ModelPlan, names: Set[str], because: Mapping[str, str] | None = None) -> ModelPlan:
    """The plan in which only the layers in `names` are quantized; the others are kept, `because` of what is said there
    by layer."""
    layers = tuple(layer for layer in plan.layers if layer.name in names)
    if len(layers) == len(plan.layers):
        return plan
    dropped = tuple(layer.linear for layer in plan.layers if layer.name not in names)
    planned = {layer.name for layer in layers}
    inputs = tuple(shared for group in plan.inputs if (shared := _only(group, planned)) is not None)
    reasons = {linear.name: said for linear in dropped if (said := (because or {}).get(linear.name))}
    return replace(
        plan,
        layers=layers,
        kept=(*plan.kept, *dropped),
        kept_because={**plan.kept_because, **reasons},
        inputs=inputs,
    )
