"""The whole model that is tuned, or whose last linear is fitted; and the way to that linear.

Hidden states go through the 4-bit blocks, one after the other. One block at a time has weights; what is between the
blocks always has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from svdq_cli.planning import blocks
from svdq_cli.reconstruct.block_graph import BlockGraph
from svdq_cli.reconstruct.calls import Call, Trajectory
from svdq_cli.reconstruct.hidden_states import HiddenStates
from svdq_cli.reconstruct.last_linear import HELD_OUT, Moments, fitted, moments_of
from svdq_cli.reconstruct.swap_modules import put, put_for_now
from svdq_cli.reconstruct.tensor_cache import Kept, TensorCache
from svdq_cli.records import Event, LayerSolution, ModelPlan, Observer, ignore_events
from svdq_cli.reports import OutputSearch
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.system.allocator import return_freed_memory
from svdq_cli.system.machine import on_device
from svdq_cli.system.offload import filled_copy


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What reconstruction needs to have seen of the whole 16-bit model."""

    trajectories: Sequence[Trajectory]  # in the order of images
    block_graph: BlockGraph

    @property
    def calls(self) -> list[Call]:
        return [call for each in self.trajectories for call in each.calls]


@dataclass(frozen=True, slots=True, eq=False)
class FittedOutput:
    """The last linear as it was fitted: `weight` (N, K) and `bias` (N,) in float32, None where nothing is gained."""

    name: str
    weight: Tensor | None
    bias: Tensor | None
    search: OutputSearch


@dataclass(frozen=True, slots=True, eq=False)
class Reconstruction:
    """What is tuned or fitted, and with what."""

    model: nn.Module  # the 16-bit one on the device that tunes, whole but for the blocks
    # the state dict's, read when they are asked for: a block's when it is its turn
    weights: Mapping[str, Tensor]
    plan: ModelPlan
    solutions: Mapping[str, LayerSolution]  # of every layer
    recording: Recording
    tensor_cache: TensorCache
    room: int = 0  # bytes on the device for weights of blocks whose turn it is not

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.model.parameters() if not p.is_meta)


def fit_output(job: Reconstruction, *, observe: Observer = ignore_events) -> FittedOutput:
    """The model's last linear, which there has to be, fitted behind the 4-bit blocks as they are."""
    order, name = job.recording.block_graph.order, job.recording.block_graph.last_linear
    assert name is not None
    started = time.monotonic()
    observe(Event("start", "output", 0, len(order)))
    walk = _Walk(job)
    for done, block in enumerate(order, 1):
        walk.through(block)
        return_freed_memory()
        observe(Event("advance", "output", done, len(order), block, time.monotonic() - started))
    found = walk.fitted(name)
    observe(Event("end", "output", len(order), len(order), seconds=time.monotonic() - started))
    return found


class _Walk:
    """The hidden states of the 4-bit model on their way through it."""

    def __init__(self, job: Reconstruction) -> None:
        self._job, self._device = job, job.device
        block_graph, calls = job.recording.block_graph, job.recording.calls
        self._quantized = HiddenStates(job.model, block_graph, calls, job.tensor_cache)
        heads = tuple(f"{block}." for block in block_graph.order)
        beside = [layer.name for layer in job.plan.layers if not layer.name.startswith(heads)]
        self._beside = runnable(self._read(beside))

    def through(self, block: str) -> None:
        """To the other side of the next block."""
        filled = filled_copy(self._job.model, block, self._job.weights, device=self._device)
        inside = [layer.name for layer in self._job.plan.layers if layer.name.startswith(f"{block}.")]
        solutions = self._read(inside)
        with put_for_now(self._job.model, {block: filled}):
            given = self._given(block)
            put(self._job.model, runnable(solutions))
            self._pass_on(block, given)

    def _given(self, block: str) -> list[Kept]:
        """What the blocks before the 4-bit block hand over to it in every call: args, kwargs."""
        given: list[Kept] = []
        with put_for_now(self._job.model, self._beside):
            for index in self._calls:
                call = self._quantized.given(block, index, self._device)
                given.append(self._job.tensor_cache.keep((call.args, call.kwargs)))
                self._quantized.forget(block, index)
        return given

    @torch.no_grad()
    def _pass_on(self, block: str, given: list[Kept]) -> None:
        """What the 4-bit block makes of that. `given` is empty then: there is no room for both."""
        for index in self._calls:
            args, kwargs = given.pop(0).on(self._device)
            self._quantized.keep(block, index, self._job.model.get_submodule(block)(*args, **kwargs))
            self._quantized.forget(block, index)

    def fitted(self, name: str) -> FittedOutput:
        """The last linear, once the walk is behind all blocks."""
        linear = cast("nn.Linear", self._job.model.get_submodule(name))
        biased = "bias" in linear.state_dict()
        trajectories = self._job.recording.trajectories
        cut = len(trajectories) - max(1, len(trajectories) // HELD_OUT)
        train: Moments | None = None
        judge: Moments | None = None
        first = 0
        for number, each in enumerate(trajectories):
            calls = range(first, first + len(each.calls))
            first = calls.stop
            if (summed := self._summed(name, calls)) is None:
                continue
            found = moments_of(*summed, constant=float(len(calls)) if biased else None)
            if number < cut:
                train = found if train is None else train + found
            else:
                judge = found if judge is None else judge + found
        change, search = fitted(train, judge)
        if change is None:
            return FittedOutput(name, None, None, search)
        change = change.to(linear.weight)
        weight = linear.weight.detach() + change[: linear.in_features].T
        bias = (linear.bias.detach() + change[-1]).float().cpu() if biased else None
        return FittedOutput(name, weight.float().cpu(), bias, search)

    def _summed(self, name: str, calls: range) -> tuple[Tensor, Tensor, Tensor] | None:
        """Over the calls of one trajectory: what the last linear is given behind the 4-bit blocks (M, K), what it makes
        of that, and what it returned in the 16-bit model (M, N)."""
        total: tuple[Tensor, ...] | None = None
        for index in calls:
            with put_for_now(self._job.model, self._beside):
                found = self._quantized.at_the_end(name, index, self._device)
            if found is None:
                return None
            parts = tuple(each.float() for each in found)
            if total is not None and total[0].shape != parts[0].shape:
                return None
            total = parts if total is None else tuple(map(torch.add, total, parts))
        return None if total is None else (total[0], total[1], total[2])

    def _read(self, names: Iterable[str]) -> dict[str, LayerSolution]:
        return {name: on_device(self._job.solutions[name], self._device) for name in names}

    @property
    def _calls(self) -> range:
        return range(sum(len(each.calls) for each in self._job.recording.trajectories))


def runnable(solutions: Mapping[str, LayerSolution]) -> dict[str, nn.Module]:
    """Modules that compute what layers as they are stored do."""
    return {name: quantized_linear(each) for name, each in solutions.items()}


def blocks_of(plan: ModelPlan) -> tuple[str, ...]:
    """The paths of the repeated blocks that are tuned, in the order of the plan's inputs."""
    return blocks.blocks_of([shared.layers[0] for shared in plan.inputs])
