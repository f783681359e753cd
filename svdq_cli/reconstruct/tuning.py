"""The 4-bit model tuned, as a whole, against what the 16-bit model puts out in the same calls, summed over the steps.

Ours: distillation with fixed codes. What a layer gets wrong and a later one can put right need not be put right twice,
which tuning one block after the other, each on its own output, can't know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from svdq_cli.reconstruct.calls import Trajectory
from svdq_cli.reconstruct.objective import signals_of, trajectory_error
from svdq_cli.reconstruct.run import Reconstruction
from svdq_cli.reconstruct.tunable_model import TunableModel, recorded_outputs
from svdq_cli.records import Event, Observer, W4A4Solution, ignore_events
from svdq_cli.reports import TuningSearch
from svdq_cli.system.allocator import return_freed_memory

STEPS = 300
CALLS_PER_STEP = 3  # of one trajectory: enough pairs to see what stays from step to step
JUDGE_EVERY = 60  # steps between two looks at the held-out trajectories
LEARNING_RATE = 2e-3  # a step's size relative to a parameter's RMS, at most
WARM_UP = 20  # steps until there: Adam's first ones know little
HELD_OUT = 4  # one trajectory in four judges: the last ones, which are of other images


def tune_model(
    job: Reconstruction, *, seed: int, observe: Observer = ignore_events
) -> tuple[TuningSearch, Iterator[tuple[str, dict[str, W4A4Solution]]]]:
    """What tuning brought on held-out trajectories, and the solutions of each block's tuned layers; none where it
    brought nothing."""
    trajectories = job.recording.trajectories
    cut = len(trajectories) - max(1, len(trajectories) // HELD_OUT)
    train, judge = trajectories[:cut], trajectories[cut:]
    signals = signals_of(recorded_outputs(call) for call in job.recording.calls)
    model = TunableModel(job)

    def error(each: Trajectory, indices: Sequence[int]) -> Tensor:
        return trajectory_error([model.errors(each.calls[i]) for i in indices], signals, each.length)

    @torch.no_grad()
    def judged() -> float:
        with model.as_stored():
            return sum(float(error(each, range(len(each.calls)))) for each in judge) / len(judge)

    started = time.monotonic()

    def tell(kind: Literal["start", "advance", "end"], done: int, detail: str = "") -> None:
        observe(Event(kind, "reconstruct", done, STEPS, detail, time.monotonic() - started))

    tell("start", 0)
    best: list[Tensor] | None = None
    with model.running():
        before = least = judged()
        for step in _steps(model, train, error, seed) if train and model.parameters else ():
            detail = ""
            if step % JUDGE_EVERY == 0 or step == STEPS:
                reached = judged()
                detail = f"held-out error {before:.2e} -> {reached:.2e}"
                if reached < least:
                    least, best = reached, [value.detach().clone() for value in model.parameters]
                return_freed_memory()
            tell("advance", step, detail)
    tell("end", STEPS)
    if best is None:
        return TuningSearch(before, before), iter(())
    model.set(best)
    return TuningSearch(before, least), model.stored()


def _steps(
    model: TunableModel,
    train: Sequence[Trajectory],
    error: Callable[[Trajectory, Sequence[int]], Tensor],
    seed: int,
) -> Iterator[int]:
    """Adam's steps, each as soon as it is taken, by its number from 1. Every trajectory has its turn before any has its
    second."""
    optimizer = _optimizer(model.parameters)
    drawn = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for step in range(STEPS):
        share = min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * share
        waiting = waiting or torch.randperm(len(train), generator=drawn).tolist()
        each = train[waiting.pop()]
        some = torch.randperm(len(each.calls), generator=drawn)[:CALLS_PER_STEP].tolist()
        with torch.enable_grad():
            error(each, some).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1


def _optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    rates = [(parameter, LEARNING_RATE * _size(parameter)) for parameter in parameters]
    return torch.optim.Adam([{"params": [parameter], "lr": rate, "full": rate} for parameter, rate in rates])


def _size(parameter: nn.Parameter) -> float:
    """A parameter's RMS; of a smoothing factor, that of its logarithm."""
    return max(float(parameter.detach().float().square().mean().sqrt()), 1e-4)
