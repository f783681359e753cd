"""What a model class consists of, from an instance without memory: its linear layers, its tensors, its block stacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from svdq_cli.errors import InputError
from svdq_cli.families import Family
from svdq_cli.records import Linear
from svdq_cli.source import Source, denoisers_of, take_experts_apart
from svdq_cli.source.classes import arguments_of, empty_instance
from svdq_cli.storage.library_facts import library_fact

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every linear of a model class at a given config, in module order, and its parameter count."""

    model_class: str
    linears: tuple[Linear, ...]
    state: Mapping[str, tuple[int, ...]]  # every tensor of the state dict: name -> shape
    parameters: int
    stacks: tuple[str, ...]  # paths of the outermost lists of alike blocks


def take_inventory(source: Source, family: Family | None) -> Inventory:
    """The inventory of the source's model class, or of all its denoisers under their joint names. `family` names the
    class where the config does not.

    Raises InputError (kind `unknown-family`) for a class that this environment does not define.
    """
    class_name, config = model_config(source, family)
    first = _inventory(class_name, config, str(source.path))
    others = {part.component: take_inventory(part, family) for part in denoisers_of(source)[1:]}
    return _joined(first, others) if others else first


def _joined(first: Inventory, others: Mapping[str, Inventory]) -> Inventory:
    """`others` by component; the class is the first's."""
    linears, state, stacks = [*first.linears], dict(first.state), [*first.stacks]
    for component, other in others.items():
        linears += [replace(linear, name=f"{component}.{linear.name}") for linear in other.linears]
        state |= {f"{component}.{name}": shape for name, shape in other.state.items()}
        stacks += [f"{component}.{stack}" for stack in other.stacks]
    return Inventory(
        model_class=first.model_class,
        linears=tuple(linears),
        state=state,
        parameters=first.parameters + sum(other.parameters for other in others.values()),
        stacks=tuple(stacks),
    )


def empty_model(source: Source, family: Family | None) -> nn.Module:
    """An instance of the class of the source's (first) denoiser on torch's meta device: shapes without memory."""
    return _empty(*model_config(source, family), str(source.path))


def _empty(class_name: str, config: str, where: str) -> nn.Module:
    model = empty_instance(class_name, config, where)
    take_experts_apart(model)
    return model


def model_config(source: Source, family: Family | None) -> tuple[str, str]:
    """The class name and the arguments (JSON) that build the source's model."""
    class_name = source.config.get("_class_name") or (family.classes[0] if family else None)
    if class_name is None:
        raise InputError(
            f"{source.path}: the config does not name a model class",
            hint="add _class_name to config.json, or name the family with --family",
            where=str(source.path),
            kind="unknown-family",
        )
    return str(class_name), arguments_of(source.config)


@lru_cache(maxsize=8)
def _inventory(class_name: str, config: str, where: str) -> Inventory:
    found = library_fact(
        "inventory", (class_name, config), lambda: asdict(_asked_inventory(class_name, config, where))
    )
    fact = cast("dict[str, Any]", found)
    return Inventory(
        model_class=fact["model_class"],
        linears=tuple(Linear(**linear) for linear in fact["linears"]),
        state={name: tuple(shape) for name, shape in fact["state"].items()},
        parameters=fact["parameters"],
        stacks=tuple(fact["stacks"]),
    )


def _asked_inventory(class_name: str, config: str, where: str) -> Inventory:
    model = _empty(class_name, config, where)
    return Inventory(
        model_class=type(model).__name__,  # a legacy name becomes the class that diffusers makes of it
        linears=tuple(linear for name, module in model.named_modules() if (linear := _linear(name, module))),
        state={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        parameters=sum(p.numel() for p in model.parameters()),
        stacks=_stacks(model),
    )


def _linear(name: str, module: nn.Module) -> Linear | None:
    from torch import nn

    from svdq_cli.planning.pointwise import is_pointwise

    if isinstance(module, nn.Linear):
        return Linear(
            name, module.in_features, module.out_features, getattr(module, "bias", None) is not None
        )
    if isinstance(module, nn.Conv2d) and is_pointwise(module):
        bias = module.bias is not None
        return Linear(name, module.in_channels, module.out_channels, bias, kind="conv1x1")
    return None


def _stacks(model: nn.Module) -> tuple[str, ...]:
    """Lists whose members are of one class and hold two linear layers or more, none inside another. A dictionary with
    numbers for keys is such a list with gaps."""
    from torch import nn

    found: list[str] = []
    for name, module in model.named_modules():
        numbered = isinstance(module, nn.ModuleDict) and all(key.isdigit() for key in module)
        if not (numbered or isinstance(module, nn.ModuleList)):
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        members = list(module._modules.values())
        alike = len({type(member) for member in members}) == 1
        if alike and all(_linears_in(member) >= 2 for member in members):
            found.append(name)
    return tuple(found)


def _linears_in(module: nn.Module | None) -> int:
    """0 for a member of a list that is left empty, as some autoencoders have one."""
    from torch import nn

    return 0 if module is None else sum(isinstance(part, nn.Linear) for part in module.modules())
