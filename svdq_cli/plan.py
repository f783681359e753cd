"""Decide what becomes of every linear layer, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from svdq_cli.errors import InputError, RecipeError
from svdq_cli.families import Family, family_named, family_of_config
from svdq_cli.records import LayerPlan, Linear, ModelPlan, Precision, SharedInput, W4A4Plan, W4A16Plan
from svdq_cli.source import Source


@dataclass(frozen=True, slots=True)
class LayerOverride:
    """A recipe's wish for the layers that match `match` (a full-path pattern): another rank, or 16 bit."""

    match: str
    rank: int | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every linear of a model class at a given config, in module order, and its parameter count."""

    model_class: str
    linears: tuple[Linear, ...]
    state: Mapping[str, tuple[int, ...]]  # every tensor of the state dict: name -> shape
    parameters: int


def plan_model(
    source: Source,
    *,
    precision: Precision,
    rank: int,
    family: str = "auto",
    overrides: tuple[LayerOverride, ...] = (),
    supports: Callable[[LayerPlan], str | None],
) -> ModelPlan:
    """The plan of one model.

    `supports` is the output format's say: None, or why it can't hold a layer; such a layer is kept at 16 bit.
    Raises InputError when names and rules disagree, RecipeError for an override that matches nothing.
    """
    where = str(source.path)
    known = family_of_config(source.config, where=where) if family == "auto" else family_named(family)
    inventory = take_inventory(source, known)
    _check_weights(source, inventory)
    w4a4, w4a16, inputs = _resolve_rules(known, inventory, where)
    _check_overrides(overrides, [*w4a4, *w4a16])

    layers: list[LayerPlan] = []
    kept: list[Linear] = []
    for linear in inventory.linears:
        override = _override_for(linear.name, overrides)
        wanted: LayerPlan | None = None
        if linear.name in w4a4:
            wanted = W4A4Plan(linear, precision, override.rank if override and override.rank else rank)
        elif linear.name in w4a16:
            wanted = W4A16Plan(linear)
        if wanted is None or (override and override.keep) or supports(wanted) is not None:
            kept.append(linear)
        else:
            layers.append(wanted)
    if not layers:
        raise InputError(
            f"{where}: nothing to quantize: no layer of this model fits the output format",
            hint="4-bit layers need input and output sizes that are multiples of 128",
            where=where,
        )
    planned = {layer.name for layer in layers}
    return ModelPlan(
        family=known.name,
        model_class=inventory.model_class,
        component=source.component,
        parameters=inventory.parameters,
        layers=tuple(layers),
        kept=tuple(kept),
        inputs=tuple(shared for group in inputs if (shared := _only(group, planned)) is not None),
    )


def take_inventory(source: Source, family: Family) -> Inventory:
    """The linears of the source's model class, from an instance without memory (torch's meta device)."""
    class_name = str(source.config.get("_class_name", family.classes[0]))
    config = {k: v for k, v in source.config.items() if not k.startswith("_") and k != "quantization_config"}
    return _inventory(class_name, json.dumps(config, sort_keys=True), str(source.path))


@lru_cache(maxsize=8)
def _inventory(class_name: str, config: str, where: str) -> Inventory:
    import torch
    from diffusers import models

    model_type = getattr(models, class_name)
    try:
        with torch.device("meta"):
            model = model_type.from_config(json.loads(config))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: diffusers can't build {class_name} from this config: {error}",
            hint="compare config.json with the original model's",
            where=where,
        ) from error
    linears = tuple(
        Linear(name, module.in_features, module.out_features, getattr(module, "bias", None) is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Inventory(class_name, linears, state, sum(p.numel() for p in model.parameters()))


def _check_weights(source: Source, inventory: Inventory) -> None:
    """The weights' names and shapes must be those of the model class. A bare config has none to check."""
    if not source.tensors:
        return
    where = str(source.path)
    if missing := [name for name in inventory.state if name not in source.tensors]:
        raise InputError(
            f"{where}: {len(missing)} tensors of {inventory.model_class} are missing, the first is {missing[0]}",
            hint="the download is incomplete or config.json belongs to another model",
            where=missing[0],
        )
    if extra := sorted(source.tensors.keys() - inventory.state.keys()):
        raise InputError(
            f"{where}: {len(extra)} tensors do not belong to {inventory.model_class}, the first is {extra[0]}",
            hint="config.json belongs to another model, or an adapter was saved into the weights",
            where=extra[0],
        )
    for name, shape in inventory.state.items():
        if source.tensors[name].shape != shape:
            raise InputError(
                f"{where}: {name} has shape {list(source.tensors[name].shape)}, the config says {list(shape)}",
                hint="config.json belongs to another model",
                where=name,
            )


def _resolve_rules(
    family: Family, inventory: Inventory, where: str
) -> tuple[frozenset[str], frozenset[str], tuple[SharedInput, ...]]:
    """Rules against names: every rule must match, every linear must be spoken of."""
    names = [linear.name for linear in inventory.linears]
    present = set(names)
    inputs: list[SharedInput] = []
    w4a4: set[str] = set()
    modulation: list[str] = []
    unmatched: list[str] = []
    for block in family.blocks:
        for prefix in _block_prefixes(names, block.stack):
            for rule in block.w4a4:
                full = tuple(f"{prefix}.{layer}" for layer in rule.layers)
                unmatched += [name for name in full if name not in present]
                branches = tuple(tuple(f"{prefix}.{layer}" for layer in part) for part in rule.branches)
                inputs.append(SharedInput(full[0], full, branches))
                w4a4.update(full)
            for layer in block.w4a16:
                modulation.append(f"{prefix}.{layer}")
                if modulation[-1] not in present:
                    unmatched.append(modulation[-1])
    if unmatched:
        raise InputError(
            f"{where}: the rules of family {family.name!r} name {len(unmatched)} layers that this model lacks: "
            f"{', '.join(unmatched[:3])}",
            hint="the model is a variant of the family that this version does not know",
            where=unmatched[0],
            kind="unknown-family",
        )
    spoken = w4a4 | set(modulation)
    silent = [n for n in names if n not in spoken and not any(fnmatchcase(n, p) for p in family.keep)]
    if silent:
        raise InputError(
            f"{where}: no rule of family {family.name!r} speaks of {len(silent)} linear layers: "
            f"{', '.join(silent[:3])}",
            hint="the model is a variant of the family that this version does not know",
            where=silent[0],
            kind="unknown-family",
        )
    if modulation:
        inputs.append(SharedInput(modulation[0], tuple(modulation), tuple((name,) for name in modulation)))
    return frozenset(w4a4), frozenset(modulation), tuple(inputs)


def _block_prefixes(names: list[str], stack: str) -> list[str]:
    """The paths of a stack's blocks, in order: transformer_blocks.0, transformer_blocks.1, ..."""
    start = stack + "."
    return list(
        dict.fromkeys(start + name[len(start) :].split(".")[0] for name in names if name.startswith(start))
    )


def _override_for(name: str, overrides: tuple[LayerOverride, ...]) -> LayerOverride | None:
    """The last override that matches wins, as in a list of exceptions."""
    return next((o for o in reversed(overrides) if fnmatchcase(name, o.match)), None)


def _check_overrides(overrides: tuple[LayerOverride, ...], names: list[str]) -> None:
    for override in overrides:
        if not any(fnmatchcase(name, override.match) for name in names):
            near = get_close_matches(override.match, names, n=1, cutoff=0.3)
            raise RecipeError(
                f"layers: the pattern {override.match!r} matches no quantized layer",
                hint=f"the nearest layer is {near[0]}" if near else "svdq inspect lists the layers",
                where=override.match,
            )


def _only(shared: SharedInput, planned: set[str]) -> SharedInput | None:
    """A shared input without the layers that are kept after all."""
    layers = tuple(name for name in shared.layers if name in planned)
    if not layers:
        return None
    branches = (tuple(name for name in part if name in planned) for part in shared.branches)
    return SharedInput(layers[0], layers, tuple(part for part in branches if part))
