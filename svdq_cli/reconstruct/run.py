"""One block after the other, each tuned on what the 4-bit blocks before it really hand over."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.machine import on_device
from svdq_cli.reconstruct.calls import Call, Trajectory, detached
from svdq_cli.reconstruct.objective import signals_of, trajectory_error
from svdq_cli.reconstruct.tunable import TunableBlock, frozen
from svdq_cli.records import (
    BlockSearch,
    Event,
    LayerSolution,
    ModelPlan,
    Observer,
    SharedInput,
    W4A4Solution,
    ignore_events,
)
from svdq_cli.runtime.linear import quantized_linear

STEPS = 150
CALLS_PER_STEP = 3  # of one trajectory: enough pairs to see what stays from step to step
JUDGE_EVERY = 30  # steps between two looks at the held-out trajectories
LEARNING_RATE = 2e-3  # a step's size relative to a parameter's RMS
HELD_OUT = 4  # one trajectory in four judges: the last ones, which are of other pictures


@dataclass(frozen=True, slots=True, eq=False)
class _Passage:
    """What one block was given, and what it made of it in the 16-bit model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Passages:
    """A block's part of one trajectory."""

    of: tuple[_Passage, ...]
    length: int  # of the whole trajectory


def reconstruct(
    model: nn.Module,
    plan: ModelPlan,
    solutions: Mapping[str, LayerSolution],
    trajectories: Sequence[Trajectory],
    *,
    seed: int,
    observe: Observer = ignore_events,
) -> tuple[dict[str, LayerSolution], dict[str, BlockSearch]]:
    """Tuned solutions and what that brought per block. `model` is the 16-bit model, on the device that tunes; it is
    left with converted linears. `trajectories`: in the order of pictures.

    A block that tuning does not make better on held-out trajectories keeps its solutions. Costs two passes through the
    blocks before it per block and call.
    """
    device = next(model.parameters()).device
    model.requires_grad_(False)
    best = {name: on_device(solution, device) for name, solution in solutions.items()}
    blocks = _in_order(model, blocks_of(plan), trajectories[0].calls[0])
    originals = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    converted: set[str] = set()
    reports: dict[str, BlockSearch] = {}
    started = time.monotonic()
    observe(Event("start", "reconstruct", 0, len(blocks)))
    for block, inputs in blocks.items():
        _put(model, originals)
        wanted = [[_passage(model, block, call)[1] for call in each.calls] for each in trajectories]
        _put(model, {name: _runnable(best[name]) for name in converted})
        passages = [
            _Passages(_given(model, block, each.calls, exact), each.length)
            for each, exact in zip(trajectories, wanted, strict=True)
        ]
        names = [name for shared in inputs for name in shared.layers]
        tuned, report = _tune(model.get_submodule(block), inputs, best, passages, model, seed)
        best.update(tuned)
        reports[block] = report
        converted.update(names)
        gain = f"{block}  {report.before:.2e} -> {report.after:.2e}"
        observe(Event("advance", "reconstruct", len(reports), len(blocks), gain, time.monotonic() - started))
    observe(Event("end", "reconstruct", len(blocks), len(blocks), seconds=time.monotonic() - started))
    return {name: on_device(solution, torch.device("cpu")) for name, solution in best.items()}, reports


def blocks_of(plan: ModelPlan) -> dict[str, list[SharedInput]]:
    """The repeated blocks by path, each with its inputs: the deepest numbered module that holds several inputs."""
    holders: dict[str, list[SharedInput]] = {}
    for shared in plan.inputs:
        parts = shared.layers[0].split(".")
        for end in range(1, len(parts)):
            if parts[end - 1].isdigit():
                holders.setdefault(".".join(parts[:end]), []).append(shared)
    several = {path: inputs for path, inputs in holders.items() if len(inputs) > 1}
    return {
        path: inputs
        for path, inputs in several.items()
        if not any(other.startswith(path + ".") for other in several)
    }


def _in_order(
    model: nn.Module, blocks: dict[str, list[SharedInput]], call: Call
) -> dict[str, list[SharedInput]]:
    """The blocks in the order in which the model runs them."""
    order: list[str] = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path in blocks
    ]
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: blocks[path] for path in dict.fromkeys(order)}


class _Reached(Exception):
    """The block that was waited for has been reached; the rest of the model need not run."""


@torch.no_grad()
def _passage(
    model: nn.Module, block: str, call: Call, *, run: bool = True
) -> tuple[Call, tuple[Tensor, ...]]:
    """What `block` is given in one call of the model, and (with `run`) what it returns."""
    seen: list[Call] = []
    made: list[tuple[Tensor, ...]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(detached(args), detached(kwargs)))
        if not run:
            raise _Reached

    def after(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        made.append(_tensors(output))
        raise _Reached

    module = model.get_submodule(block)
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        model(*call.args, **call.kwargs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], made[0] if made else ()


def _given(
    model: nn.Module, block: str, calls: Sequence[Call], wanted: Sequence[tuple[Tensor, ...]]
) -> tuple[_Passage, ...]:
    given = [_passage(model, block, call, run=False)[0] for call in calls]
    return tuple(_Passage(g.args, g.kwargs, exact) for g, exact in zip(given, wanted, strict=True))


def _tune(
    block: nn.Module,
    inputs: Sequence[SharedInput],
    solutions: Mapping[str, LayerSolution],
    passages: Sequence[_Passages],
    model: nn.Module,
    seed: int,
) -> tuple[dict[str, LayerSolution], BlockSearch]:
    names = [name for shared in inputs for name in shared.layers]
    w4a4 = {name: s for name in names if isinstance(s := solutions[name], W4A4Solution)}
    _put(model, {name: quantized_linear(solutions[name]) for name in names if name not in w4a4})
    cut = len(passages) - max(1, len(passages) // HELD_OUT)
    train, judge = passages[:cut], passages[cut:]
    signals = signals_of([passage.wanted for each in passages for passage in each.of])

    def error(passages: Sequence[_Passage], length: int) -> Tensor:
        return trajectory_error([_lost(block, passage) for passage in passages], signals, length)

    @torch.no_grad()
    def judged(found: Mapping[str, W4A4Solution]) -> float:
        with _put_for_now(model, {name: frozen(solution) for name, solution in found.items()}):
            return sum(float(error(each.of, each.length)) for each in judge) / len(judge)

    tunable = TunableBlock(inputs, w4a4)
    parameters = tunable.parameters()
    optimizer = torch.optim.Adam(
        [
            {"params": [p], "lr": LEARNING_RATE * _size(p), "full": LEARNING_RATE * _size(p)}
            for p in parameters
        ]
    )
    before = least = judged(w4a4)
    best: dict[str, W4A4Solution] = dict(w4a4)
    order = torch.Generator().manual_seed(seed)
    for step in range(STEPS if train else 0):
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * (1 - 0.9 * step / STEPS)
        each = train[int(torch.randint(len(train), (1,), generator=order))]
        some = torch.randperm(len(each.of), generator=order)[:CALLS_PER_STEP].tolist()
        with _put_for_now(model, tunable.layers), torch.enable_grad():
            loss = error([each.of[index] for index in some], each.length)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % JUDGE_EVERY == 0:
            stored = tunable.rounded()
            if (reached := judged(stored)) < least:
                best, least = stored, reached
    return dict(best), BlockSearch(before, least)


def _size(parameter: nn.Parameter) -> float:
    """A parameter's RMS; of a smoothing factor, that of its logarithm."""
    return max(float(parameter.detach().float().square().mean().sqrt()), 1e-4)


def _lost(block: nn.Module, passage: _Passage) -> tuple[Tensor, ...]:
    """What the block's outputs are off by."""
    found = _tensors(block(*passage.args, **passage.kwargs))
    return tuple(out.float() - exact.float() for out, exact in zip(found, passage.wanted, strict=True))


def _put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)


@contextmanager
def _put_for_now(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in layers}
    _put(model, layers)
    try:
        yield
    finally:
        _put(model, before)


def _runnable(solution: LayerSolution) -> nn.Module:
    return frozen(solution) if isinstance(solution, W4A4Solution) else quantized_linear(solution)


def _tensors(output: object) -> tuple[Tensor, ...]:
    """A block's output tensors, whatever they come in."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, (tuple, list)):
        return tuple(tensor for part in output for tensor in _tensors(part))
    return ()
