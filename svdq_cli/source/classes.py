"""The model classes that a config names: diffusers' own, built without memory to see what tensors they have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from svdq_cli.errors import InputError
from svdq_cli.storage.library_facts import library_fact
from svdq_cli.system.allocator import unwatched_garbage

if TYPE_CHECKING:
    from torch import nn

MAX_MODULES = 1000  # of one kind in a model; the deepest of today have about 100 blocks
_COUNTS_MODULES = re.compile(r"layers|blocks|depth|num_stages")


def model_class(name: str, *, where: str) -> Any:
    """The model class of that name: one of diffusers', or a ModelMixin that the running program has defined.

    Raises InputError (kind `unknown-family`); never runs code found next to the weights.
    """
    with unwatched_garbage():
        from diffusers import models
        from diffusers.models.modeling_utils import ModelMixin

    found = getattr(models, name, None) or _subclasses(ModelMixin).get(name)
    if found is None:
        import diffusers

        raise InputError(
            f"{where}: diffusers {diffusers.__version__} has no model class {name!r}",
            hint="upgrade diffusers, or import the module that defines the class before calling svdq; "
            "svdq runs no code from a model's folder",
            where=where,
            kind="unknown-family",
        )
    return found


def _subclasses(base: type) -> dict[str, type]:
    found: dict[str, type] = {}
    for child in base.__subclasses__():
        found |= {child.__name__: child, **_subclasses(child)}
    return found


def empty_instance(class_name: str, config: str, where: str) -> nn.Module:
    """A model on torch's meta device: shapes without memory. `config`: the constructor's arguments as JSON.

    Raises InputError where this environment does not define the class or it can't be built from these arguments.
    """
    import torch

    model_type = model_class(class_name, where=where)
    _refuse_endless(json.loads(config), where)
    try:
        with torch.device("meta"):
            return cast("nn.Module", model_type.from_config(json.loads(config)))
    except Exception as error:  # what diffusers' constructors raise at odd values is of every kind
        raise InputError(
            f"{where}: diffusers can't build {class_name} from this config: {type(error).__name__}: {error}",
            hint="compare config.json with the original model's",
            where=where,
        ) from error


def _refuse_endless(config: Mapping[str, object], where: str) -> None:
    """Building modules takes time even without memory: a config that asks for a billion layers is damaged."""
    for key, value in config.items():
        counts = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
        if _COUNTS_MODULES.search(key) and any(count > MAX_MODULES for count in counts):
            raise InputError(
                f"{where}: config.json: {key} is {value}, but no model has that many",
                hint="compare config.json with the original model's",
                where=where,
            )


def arguments_of(config: Mapping[str, object]) -> str:
    """What a config hands to its class's constructor, as JSON."""
    return json.dumps(
        {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"},
        sort_keys=True,
    )


def shapes_of(config: Mapping[str, object], *, where: str) -> Mapping[str, tuple[int, ...]]:
    """The tensors of the model that a config describes: name -> shape. Raises InputError as `empty_instance` does."""
    return _shapes(str(config.get("_class_name")), arguments_of(config), where)


@lru_cache(maxsize=4)
def _shapes(class_name: str, config: str, where: str) -> Mapping[str, tuple[int, ...]]:
    def ask() -> Mapping[str, tuple[int, ...]]:
        state = empty_instance(class_name, config, where).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    shapes = cast("dict[str, list[int]]", library_fact("shapes", (class_name, config), ask))
    return {name: tuple(shape) for name, shape in shapes.items()}
