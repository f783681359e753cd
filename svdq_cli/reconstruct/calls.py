"""Calls of the whole model while images are generated, kept as trajectories: one image, step after step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the whole model while an image was generated."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...] | None = None  # what it returned; None where that was not recorded


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """Calls of the model at different steps of the same images, in order."""

    calls: tuple[Call, ...]
    length: int  # calls there were, of which `calls` are a sample


def record_trajectories(
    model: nn.Module, runs: Iterable[Callable[[], object]], *, steps: int, most: int
) -> list[Trajectory]:
    """The trajectories of each of `runs`, which generate one batch of images each in `steps` steps.

    Of a trajectory at most `most` calls are kept, evenly spaced. A model that is called several times a step (true
    guidance, with and without the prompt) gives as many trajectories.
    """
    return record_each({"": model}, runs, steps=steps, most=most)[""]


def record_each(
    models: Mapping[str, nn.Module], runs: Iterable[Callable[[], object]], *, steps: int, most: int
) -> dict[str, list[Trajectory]]:
    """`record_trajectories` of all models of a pipeline at once, by name."""
    found: dict[str, list[Trajectory]] = {name: [] for name in models}
    for run in runs:
        calls = _calls_of(models, run)
        turns = len(list(groupby(name for name, _ in calls)))
        in_turn = turns == len({name for name, _ in calls})  # each model has its part of the steps
        for name in models:
            own = [call for caller, call in calls if caller == name]
            a_step = _calls_a_step(len(calls) if in_turn else len(own), steps)
            found[name] += [
                Trajectory(evenly_spaced(strand, most), len(strand)) for strand in _strands(own, a_step)
            ]
    return found


def evenly_spaced(calls: Sequence[Call], most: int) -> tuple[Call, ...]:
    """At most `most` evenly spaced calls, the first and the last among them."""
    count = min(most, len(calls))
    return tuple(calls[round(i * (len(calls) - 1) / max(count - 1, 1))] for i in range(count))


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value with a function applied to every tensor, in tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(mapped(part, change) for part in value)
    if isinstance(value, list):
        return [mapped(part, change) for part in value]
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    return value


def tensors_of(value: object) -> tuple[Tensor, ...]:
    """The tensors of what a module takes or returns, in order, whatever they come in. Of any shape."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return tuple(found)


def detached(value: Any) -> Any:
    """A value whose tensors are detached from gradients."""
    return mapped(value, Tensor.detach)


def _calls_of(models: Mapping[str, nn.Module], run: Callable[[], object]) -> list[tuple[str, Call]]:
    """Records the calls of all models, in the order in which they are made."""
    calls: list[tuple[str, Call]] = []

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: calls.append((name, Call(detached(args), detached(kwargs))))

    def returned(_module: nn.Module, _args: object, output: object) -> None:
        name, call = calls[-1]
        # copies, because a pipeline may go on in their memory
        calls[-1] = name, replace(call, outputs=tuple(each.detach().clone() for each in tensors_of(output)))

    handles = [
        model.register_forward_pre_hook(noting(name), with_kwargs=True) for name, model in models.items()
    ]
    handles += [model.register_forward_hook(returned) for model in models.values()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _calls_a_step(calls: int, steps: int) -> int:
    return calls // steps if calls % steps == 0 else 1


def _strands(calls: Sequence[Call], a_step: int) -> list[Sequence[Call]]:
    """Calls of one batch, those that follow one another in time and have inputs of one shape together."""
    strands = [strand for first in range(a_step) if (strand := calls[first::a_step])]
    return [
        part
        for strand in strands
        for part in ([strand] if len({_shapes(c) for c in strand}) < 2 else [[c] for c in strand])
    ]


def _shapes(call: Call) -> tuple[tuple[int, ...], ...]:
    values = (*call.args, *call.kwargs.values())
    return tuple(tuple(value.shape) for value in values if isinstance(value, Tensor))
