"""What a tensor's name and shape say of a model's config, and how a model class is told by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from svdq_cli.source.names import block_numbers


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Shapes = Mapping[str, HasShape]
Facts = dict[str, object]


@dataclass(frozen=True, slots=True)
class KnownClass:
    """One diffusers model class: the keys that give it away, and what its shapes say about its config.

    `facts` reads config values off the shapes. `rest` adds the values that shapes don't show, for models with those
    facts; it returns None where they are not those of a published model. Of a base pipeline's config, the `compared`
    facts must be the same (they tell variants apart); the `counted` ones need not: a pruned model has fewer blocks.
    `beside` reads values off tensors of an original checkpoint that diffusers' class has no place for; a base must have
    the same.
    `relatives` are classes whose tensors have the same names, so that only a base tells which one it is.
    """

    model_class: str
    component: str
    signature: frozenset[str]
    facts: Callable[[Shapes], Facts]
    rest: Callable[[Facts], Facts | None]
    counted: frozenset[str] = frozenset()
    compared: frozenset[str] = frozenset({"in_channels"})
    legacy_name: str | None = None  # what older configs call the class
    relatives: frozenset[str] = frozenset()
    beside: Callable[[Shapes], Facts] = lambda _: {}
    # facts that tell variants apart, but not their whole config value
    shown: Callable[[Shapes], Facts] = lambda _: {}


def blocks(tensors: Shapes, stack: str) -> int:
    return len(block_numbers(tuple(tensors), f"{stack}.{{}}"))


def size(tensors: Shapes, name: str, dim: int) -> int:
    """A size of a tensor; 0 where there is no such tensor, which fits no model."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[dim] if -len(shape) <= dim < len(shape) else 0


def heads(tensors: Shapes, block: str) -> Facts:
    """Head width from the width of the query norm, head count from the width of the model."""
    width = size(tensors, f"{block}.attn.norm_q.weight", 0)
    hidden = size(tensors, f"{block}.attn.to_q.weight", 0)
    return {"attention_head_dim": width, "num_attention_heads": hidden // width if width else 0}
