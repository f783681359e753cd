"""How a model's blocks hang together: the order they run in, how long what one returns is needed, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    plain stack that is the next one; in a UNet, whose skips go around others, one further on. The model's end, which
    reads what no block does, comes after all of them where there is a `last_linear`."""
    last_linear: str | None = None
    """The linear behind all blocks whose outputs are the model's, but for their order; None where there is none."""

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
    linears: list[tuple[str, Tensor]] = []

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

    def noting(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, output: linears.append((path, output))

    inside = tuple(f"{path}." for path in blocks)
    handles: list[Any] = [
        module.register_forward_hook(noting(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{path}.".startswith(inside)
    ]
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
            output = model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    once = [path for path in order if order.count(path) == 1]
    if len(once) < len(order):
        return block_graph_of(model, once, call)
    outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
    last = _last_linear(linears, outputs)
    readers = [given[path] for path in order] + ([outputs] if last else [])
    return BlockGraph(tuple(order), _last_readers(order, readers, made), last)


def _last_linear(linears: Sequence[tuple[str, Tensor]], outputs: Sequence[Tensor]) -> str | None:
    """The linear that ran last, and once, where `outputs` are rearranged from what it returned: no number of that
    reaches their sum otherwise than the next one does."""
    paths = [path for path, _ in linears]
    if not linears or paths.count(paths[-1]) > 1 or not outputs or not linears[-1][1].requires_grad:
        return None
    rearranged = rearranged_rows(outputs, linears[-1][1])
    return paths[-1] if rearranged is not None else None


def rearranged_rows(outputs: Sequence[Tensor], returned: Tensor) -> tuple[Tensor, float] | None:
    """Which rows (M,) of what a linear `returned` (..., N) `outputs` consist of, and the factor by which all of them
    are multiplied; None where outputs are anything but rearranged rows."""
    (reached,) = torch.autograd.grad(
        [tensor.sum() for tensor in outputs], [returned], retain_graph=True, allow_unused=True
    )
    if reached is None:
        return None
    rows = reached.flatten(0, -2)
    used = (rows != 0).any(1)
    factors = rows[used]
    if not len(factors) or bool((factors != factors.flatten()[0]).any()):
        return None
    return used, float(factors.flatten()[0])


def _last_readers(
    order: Sequence[str], given: Sequence[Sequence[Tensor]], made: Mapping[str, Sequence[Tensor]]
) -> dict[str, int]:
    """`given`: what each block is, and behind them the model's end."""
    last: dict[str, int] = {}
    for position, tensors in enumerate(given):
        leaves = [(block, leaf) for block in order[:position] for leaf in made[block]]
        if not tensors or not leaves:
            continue
        reached = torch.autograd.grad(
            [tensor.sum() for tensor in tensors],
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
