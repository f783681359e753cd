"""A model gone through block by block, in all recorded calls at once, though only one block has weights.

Each call is run from its start again, but blocks that were gone through only say what they returned then: what is
stored between the blocks (embeddings, a UNet's convolutions) is computed again, and no block twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.reconstruct.block_graph import BlockGraph, rearranged_rows
from svdq_cli.reconstruct.calls import Call, mapped, tensors_of
from svdq_cli.reconstruct.tensor_cache import Kept, TensorCache


class HiddenStates:
    """What blocks have returned so far in the 16-bit model, or in the 4-bit one, as far as it is still needed.

    `model`: whole but for the blocks, whose weights it does not need. `calls`: of that model.
    """

    def __init__(
        self, model: nn.Module, block_graph: BlockGraph, calls: Sequence[Call], tensor_cache: TensorCache
    ) -> None:
        self._model, self._block_graph, self._calls, self._tensor_cache = (
            model,
            block_graph,
            calls,
            tensor_cache,
        )
        self._returned: list[dict[str, Kept]] = [{} for _ in calls]
        self._shapes: list[dict[str, Any]] = [{} for _ in calls]  # of what is not needed any more

    @torch.no_grad()
    def given(self, block: str, index: int, device: torch.device) -> Call:
        """What `block` is given in one of the calls."""
        call = self._calls[index]
        forwards = {path: self._recalling(path, index, device) for path in self._before(block)}
        with standing_in(self._model, {**forwards, block: _enter}):
            try:
                self._model(*call.args, **call.kwargs)
            except _Entered as entered:
                return entered.call
        raise RuntimeError(f"{block} does not run in call {index}, although it ran in the first one")

    def at_the_end(
        self, layer: str, index: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `layer`, the graph's last linear, is given in one of the calls (M, K), what it returns, and what it
        returned when the call was recorded (M, N), in the rows that the model's output consists of. None where it is
        not rearranged from them."""
        call = self._calls[index]
        forwards = {path: self._recalling(path, index, device) for path in self._block_graph.order}
        seen: list[tuple[Tensor, Tensor]] = []

        def leaf(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            seen.append((args[0].detach(), output.detach().requires_grad_()))
            return seen[-1][1].clone()  # a leaf itself could not be changed in place

        handle = self._model.get_submodule(layer).register_forward_hook(leaf)
        try:
            with standing_in(self._model, forwards), torch.enable_grad():
                output = self._model(*call.args, **call.kwargs)
        finally:
            handle.remove()
        if len(seen) != 1:
            return None
        given, returned = seen[0]
        outputs = tensors_of(output)
        if call.outputs is None or [each.shape for each in outputs] != [each.shape for each in call.outputs]:
            return None
        pairs = [(now, then) for now, then in zip(outputs, call.outputs, strict=True) if now.requires_grad]
        rearranged = rearranged_rows([now for now, _ in pairs], returned)
        if rearranged is None:
            return None
        used, factor = rearranged
        # Each number goes back the way that it came
        (recorded,) = torch.autograd.grad(
            [now for now, _ in pairs], [returned], [then.to(now) for now, then in pairs]
        )
        exact = recorded.flatten(0, -2)[used].float() / factor**2
        return given.flatten(0, -2)[used], returned.detach().flatten(0, -2)[used], exact

    def keep(self, block: str, index: int, output: object) -> Kept:
        """What `block` returned in one of the calls."""
        kept = self._returned[index][block] = self._tensor_cache.keep(output)
        return kept

    def forget(self, block: str, index: int) -> None:
        """What no block behind `block` needs is dropped."""
        position = self._block_graph.order.index(block)
        for path in list(self._returned[index]):
            if not self._block_graph.needs(path, after=position):
                self._shapes[index][path] = self._returned[index].pop(path).shapes()

    def _before(self, block: str) -> Sequence[str]:
        return self._block_graph.order[: self._block_graph.order.index(block)]

    def _recalling(self, path: str, index: int, device: torch.device) -> Callable[..., Any]:
        def recall(*args: Any, **kwargs: Any) -> Any:
            if (kept := self._returned[index].get(path)) is not None:
                return kept.on(device)
            shapes = self._shapes[index][path]  # the numbers reach no block that is still to come
            return mapped(shapes, lambda tensor: torch.zeros_like(tensor, device=device))

        return recall


class _Entered(Exception):
    """The block that was waited for has been reached; the rest of the model need not run."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def _enter(*args: Any, **kwargs: Any) -> Any:
    raise _Entered(Call(args, kwargs))


@contextmanager
def standing_in(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Modules that for now compute something else than their own `forward`."""
    modules = [model.get_submodule(path) for path in forwards]
    for module, forward in zip(modules, forwards.values(), strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
