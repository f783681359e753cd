"""The whole 4-bit model, run with gradients, though only one block at a time needs weights.

What is handed on between blocks is kept for the way back. Inside a block, and inside modules that hold a convolution,
everything is computed once more when gradients reach them: a block gets its weights for that a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdq_cli.reconstruct.calls import Call, tensors_of
from svdq_cli.reconstruct.hidden_states import standing_in
from svdq_cli.reconstruct.run import Reconstruction, runnable
from svdq_cli.reconstruct.swap_modules import put, put_for_now
from svdq_cli.reconstruct.tunable import TunableBlock
from svdq_cli.records import LayerSolution, W4A4Solution
from svdq_cli.system.machine import on_device
from svdq_cli.system.offload import filled_block


class TunableModel:
    """The model of a job with all W4A4 layers of its blocks tunable. Its numbers stay on the device; codes and 16-bit
    weights of as many blocks as the job has room for."""

    def __init__(self, job: Reconstruction) -> None:
        self._job, self._room = job, job.room
        order = job.recording.block_graph.order
        layers = [layer.name for layer in job.plan.layers]
        self._inside = {block: [name for name in layers if name.startswith(f"{block}.")] for block in order}
        inside = {name for names in self._inside.values() for name in names}
        self._beside = runnable(self._read([name for name in layers if name not in inside]))
        self._blocks = {block: self._tunable(names) for block, names in self._inside.items()}
        self._bare = {block: deepcopy(job.model.get_submodule(block)) for block in order}
        self._resident: dict[str, nn.Module] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is tuned, in float32, in an order that is always the same."""
        return [parameter for block in self._blocks.values() for parameter in block.parameters()]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The job's model is this one for now. Backward passes belong in here, too."""
        model = self._job.model
        forwards: dict[str, Callable[..., Any]] = {
            path: partial(_again_for_gradients, model.get_submodule(path).forward)
            for path in _with_convolutions(model, self._blocks)
        }
        forwards |= {
            block: partial(_again_for_gradients, partial(self._through, block)) for block in self._blocks
        }
        with put_for_now(model, self._beside), standing_in(model, forwards):
            yield

    def errors(self, call: Call) -> tuple[Tensor, ...]:
        """What the outputs are off by in a call of the 16-bit model, in float32. Of any shape. While it is
        `running`."""
        found, exact = tensors_of(self._job.model(*call.args, **call.kwargs)), recorded_outputs(call)
        return tuple(one.float() - other.float() for one, other in zip(found, exact, strict=True))

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """All numbers rounded for now to what a checkpoint holds of them."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        for block in self._blocks.values():
            block.settle()
        try:
            yield
        finally:
            self.set(before)

    @torch.no_grad()
    def set(self, values: list[Tensor]) -> None:
        """The `parameters` again. Of any shape."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def stored(self) -> Iterator[tuple[str, dict[str, W4A4Solution]]]:
        """Every block that has tunable layers, with their solutions."""
        for block, tunable in self._blocks.items():
            found = tunable.rounded()
            solved = self._read(list(found))
            whole = {
                name: replace(each, codes=before.codes)
                for name, each in found.items()
                if isinstance(before := solved[name], W4A4Solution)
            }
            if whole:
                yield block, whole

    def _through(self, block: str, *args: Any, **kwargs: Any) -> Any:
        module = self._resident.get(block)
        if module is not None:
            return module(*args, **kwargs)
        module = self._filled(block)
        held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        held += sum(layer.weight.nbytes for layer in self._blocks[block].layers.values())
        try:
            return module(*args, **kwargs)
        finally:  # on the way back it is left by an exception
            if held <= self._room:
                self._room -= held
                self._resident[block] = module
            else:
                for layer in self._blocks[block].layers.values():
                    layer.drop()

    def _filled(self, block: str) -> nn.Module:
        """The block with everything that it runs with."""
        solutions = self._read(self._inside[block])
        tunable = self._blocks[block].layers
        for name, layer in tunable.items():
            solution = solutions[name]
            assert isinstance(solution, W4A4Solution)
            layer.take(solution)
        others = {name: each for name, each in solutions.items() if name not in tunable}
        layers = {name.removeprefix(f"{block}."): each for name, each in (runnable(others) | tunable).items()}
        module = deepcopy(self._bare[block])
        filled_block(module, block, self._job.weights, device=self._job.device, without=layers)
        put(module, layers)
        return module

    def _tunable(self, inside: list[str]) -> TunableBlock:
        # an input that layers elsewhere share too has a smoothing factor that could not be stored here
        inputs = [shared for shared in self._job.plan.inputs if set(shared.layers) <= {*inside}]
        names = [name for shared in inputs for name in shared.layers]
        w4a4 = {
            name: each
            for name, each in self._read(names).items()
            if isinstance(each, W4A4Solution) and not each.plan.curve
        }
        tunable = TunableBlock(inputs, w4a4)
        for layer in tunable.layers.values():
            layer.drop()
        return tunable

    def _read(self, names: list[str]) -> Mapping[str, LayerSolution]:
        return {name: on_device(self._job.solutions[name], self._job.device) for name in names}


def recorded_outputs(call: Call) -> tuple[Tensor, ...]:
    """What the 16-bit model returned in a call that was recorded with it. Of any shape."""
    assert call.outputs is not None
    return call.outputs


def _again_for_gradients(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _with_convolutions(model: nn.Module, blocks: Mapping[str, object]) -> list[str]:
    """The outermost modules that hold a convolution and no block: what a UNet has between its blocks."""
    around = {path[:end] for path in blocks for end, letter in enumerate(path) if letter == "."} | {""}
    apart = {*blocks, *around}
    found: list[str] = []
    for path, module in model.named_modules():
        if path in apart or path.startswith(tuple(f"{each}." for each in (*blocks, *found))):
            continue
        if any(isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d) for each in module.modules()):
            found.append(path)
    return found
