"""How a model's blocks hang together: the order they run in, and how long what one returns is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.reconstruct.calls import Call, detached, mapped, tensors_of


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """The blocks of a model that run once in each of its calls."""

    order: tuple[str, ...]
    last_reader: Mapping[str, int]
    """Block -> the position of the last block that is given something made of its outputs; missing where none is. In a
    plain stack that is the next one; in a UNet, whose skips go around others, one further on."""

    def needs(self, block: str, *, after: int) -> bool:
        """Whether a block behind position `after` is given something made of `block`'s outputs."""
        return self.last_reader.get(block, -1) > after


def block_graph_of(model: nn.Module, blocks: Collection[str], call: Call) -> BlockGraph:
    """Seen in one call. `model` is whole, its parameters ask for no gradients, and it is left as it was.

    Every block's outputs are leaves of a graph that spans only what is between the blocks, so that gradients tell
    which blocks' inputs they reach.
    """
    order: list[str] = []
    given: dict[str, list[Tensor]] = {}
    made: dict[str, list[Tensor]] = {}

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        order.append(path)
        given[path] = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
        return detached(args), detached(kwargs)

    def after(path: str, output: object) -> object:
        leaves = made[path] = []

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            leaves.append(tensor.detach().requires_grad_())
            return leaves[-1].clone()  # a leaf itself could not be changed in place

        return mapped(output, leaf)

    handles: list[Any] = []
    for path in blocks:
        module = model.get_submodule(path)
        handles += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(lambda _, args, output, path=path: after(path, output)),
        ]
    try:
        with torch.enable_grad():
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    once = [path for path in order if order.count(path) == 1]
    if len(once) < len(order):
        return block_graph_of(model, once, call)
    return BlockGraph(tuple(order), _last_readers(order, given, made))


def _last_readers(
    order: Sequence[str], given: Mapping[str, Sequence[Tensor]], made: Mapping[str, Sequence[Tensor]]
) -> dict[str, int]:
    last: dict[str, int] = {}
    for position, path in enumerate(order):
        leaves = [(block, leaf) for block in order[:position] for leaf in made[block]]
        if not given[path] or not leaves:
            continue
        reached = torch.autograd.grad(
            [tensor.sum() for tensor in given[path]],
            [leaf for _, leaf in leaves],
            retain_graph=True,
            allow_unused=True,
        )
        last |= {
            block: position
            for (block, _), gradient in zip(leaves, reached, strict=True)
            if gradient is not None
        }
    return last
