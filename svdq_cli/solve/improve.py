"""Steps beyond the paper's search: better images from the same bytes.

Learned smoothing, a denoised target, GPTQ rounding, a refitted branch. Every step is judged on rows that it did not
see; a step that does not pay is not taken, so the result is never worse there than the search it starts from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from svdq_cli.records import Precision, SearchStep, W4A4Plan, W4A4Solution
from svdq_cli.solve.denoise import denoised, moments
from svdq_cli.solve.forward import SourceWeight, dequantized_weight, relative_errors
from svdq_cli.solve.learned import learn_smoothing
from svdq_cli.solve.low_rank import split_low_rank
from svdq_cli.solve.quantizers import QuantizedWeight, fake_quantize_activation
from svdq_cli.solve.refit import RIDGE, refit_branch
from svdq_cli.solve.rounding import gptq_weight, nearest_weight

HELD_OUT = 8  # one row in eight judges: the last ones, which come from pictures that the others do not
LEAST_ROWS = 64  # with fewer there is nothing to learn from and nothing to judge on
DENOISE_RIDGES = (1.0, 0.3, 0.1, 0.03)  # from careful to bold, as long as it pays


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The layers of one shared input, split by branch, with what they are judged on."""

    branches: tuple[tuple[W4A4Plan, ...], ...]
    weights: Mapping[str, SourceWeight]
    rows: Tensor  # (M, K) float32, in the order in which pictures were drawn
    dtype: torch.dtype
    seed: int

    @property
    def plans(self) -> tuple[W4A4Plan, ...]:
        return tuple(plan for branch in self.branches for plan in branch)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(plan.linear.out_features for plan in self.plans)

    @property
    def precision(self) -> Precision:
        return self.plans[0].precision

    def stacked(self, branch: Sequence[W4A4Plan]) -> Tensor:
        """The branch's weights under one another, (sum of N, K)."""
        return torch.cat([self.weights[plan.name].weight for plan in branch])


Solutions = dict[str, W4A4Solution]


@dataclass(frozen=True, slots=True)
class Trail:
    """What the steps brought, in the order in which they were tried."""

    errors: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # layer -> step -> held-out noise over signal
    seconds: dict[str, float] = field(default_factory=dict)  # step -> for all layers of the input
    taken: list[SearchStep] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)  # why steps were left out, in words


@dataclass(slots=True, eq=False)
class _State:
    """The best so far: the solutions and the 4-bit part that they round, (sum of N, K) in smoothed coordinates."""

    solutions: Solutions
    target: Tensor


def improve(
    task: Task,
    start: Solutions,
    *,
    steps: Sequence[SearchStep],
    place: Callable[[Tensor], Tensor],
    nearest: Callable[[Tensor], Solutions],
) -> tuple[Solutions, Trail]:
    """Better solutions than `start`, and what each of `steps` brought.

    `place(s)` brings a smoothing factor to its stored form (range, size, 16 bits); `nearest(s)` solves for one with
    rounding to nearest.
    """
    trail = Trail({plan.name: {} for plan in task.plans})
    if task.rows.shape[0] < LEAST_ROWS:
        trail.fallback.append(
            f"{task.rows.shape[0]} calibration rows, {LEAST_ROWS} are needed to learn and to judge"
        )
        return start, trail
    train, judge = task.rows.tensor_split([task.rows.shape[0] * (HELD_OUT - 1) // HELD_OUT])

    def judged(solutions: Solutions) -> dict[str, float]:
        return relative_errors(judge, solutions, task.weights)

    def note(step: str, errors: Mapping[str, float]) -> float:
        for name, error in errors.items():
            trail.errors[name][step] = error
        return sum(errors.values())

    best = _State(start, _residual(task, start))
    least = note("start", judged(start))
    attempts: dict[SearchStep, Callable[[], Iterator[_State]]] = {
        "learned": lambda: _learned(task, train, best, place, nearest),
        "denoise": lambda: _denoised(task, train, best),
        "gptq": lambda: _rounded(task, train, best),
        "refit": lambda: _refitted(task, train, best),
    }
    for step in steps:
        began = time.monotonic()
        errors: dict[str, float] | None = None
        for tried in attempts[step]():
            found = judged(tried.solutions)
            if errors is not None and sum(found.values()) >= sum(errors.values()):
                break
            errors, candidate = found, tried
        if errors is None:
            trail.fallback.append(f"{step}: the activations say nothing to go by")
        elif (reached := note(step, errors)) < least:
            best, least = candidate, reached  # pyright: ignore[reportPossiblyUnbound]
            trail.taken.append(step)
        trail.seconds[step] = time.monotonic() - began
    return best.solutions, trail


# Each step yields what it would have instead of the best so far: one proposal, or several as long as they get better.


def _learned(
    task: Task,
    train: Tensor,
    best: _State,
    place: Callable[[Tensor], Tensor],
    nearest: Callable[[Tensor], Solutions],
) -> Iterator[_State]:
    """Each layer weighs the same: its rows are scaled by the size of its output."""
    shares = torch.cat(
        [
            (train @ task.weights[plan.name].weight.T)
            .square()
            .mean()
            .clamp(min=1e-30)
            .rsqrt()
            .expand(plan.linear.out_features)
            for plan in task.plans
        ]
    ).unsqueeze(1)

    def branch(smooth: Tensor) -> Tensor:
        parts = []
        for members in task.branches:
            up, down = split_low_rank(
                task.stacked(members) * smooth, rank=members[0].rank, seed=task.seed, power_iterations=1
            )
            parts.append(up @ (down / smooth))
        return torch.cat(parts) * shares

    weight = torch.cat([task.stacked(members) for members in task.branches]) * shares
    start = _smooth(best.solutions)
    smooth = place(learn_smoothing(start, weight, train, task.precision, branch=branch, seed=task.seed))
    solutions = nearest(smooth)
    yield _State(solutions, _residual(task, solutions))


def _denoised(task: Task, train: Tensor, best: _State) -> Iterator[_State]:
    """The same branches; what they leave over is denoised ever more boldly, and rounded to nearest."""
    seen = moments(train / _smooth(best.solutions), task.precision)
    exact = _residual(task, best.solutions)
    for ridge in DENOISE_RIDGES:
        target = denoised(exact, seen, ridge=ridge)
        if target is None:
            return
        quantized = nearest_weight(target, task.precision, dtype=task.dtype, parts=task.counts)
        yield _State(_with_codes(task, best.solutions, quantized), target)


def _rounded(task: Task, train: Tensor, best: _State) -> Iterator[_State]:
    """The same target, rounded by GPTQ. All layers see one input, so one Hessian serves all."""
    drawn = fake_quantize_activation(train / _smooth(best.solutions), task.precision)
    hessian = drawn.T @ drawn / len(drawn)
    quantized = gptq_weight(best.target, hessian, task.precision, dtype=task.dtype, parts=task.counts)
    yield _State(_with_codes(task, best.solutions, quantized), best.target)


def _refitted(task: Task, train: Tensor, best: _State) -> Iterator[_State]:
    """New branches for the codes there are, fitted in smoothed coordinates, where channels are of one size."""
    solutions = best.solutions
    refitted = dict(solutions)
    smooth = _smooth(solutions)
    x = train / smooth
    drawn = fake_quantize_activation(x, task.precision)
    for members in task.branches:
        down = solutions[members[0].name].down.float()
        ups = torch.cat([solutions[plan.name].up.float() for plan in members])
        product = (ups @ down) * smooth
        four_bit = torch.cat([dequantized_weight(solutions[plan.name]) for plan in members])
        missing = train @ task.stacked(members).T - drawn @ four_bit.T - x @ product.T
        found = refit_branch(x, missing, product, rank=members[0].rank, ridge=RIDGE, seed=task.seed)
        if found is None:
            continue
        up, new_down = found[0].to(task.dtype), (found[1] / smooth).to(task.dtype).contiguous()
        for plan, rows in zip(members, up.split([plan.linear.out_features for plan in members]), strict=True):
            refitted[plan.name] = replace(solutions[plan.name], down=new_down, up=rows.contiguous())
    yield _State(refitted, best.target)


def _smooth(solutions: Solutions) -> Tensor:
    return next(iter(solutions.values())).smooth.float()


def _residual(task: Task, solutions: Solutions) -> Tensor:
    """What the stored branches leave over, (sum of N, K), in smoothed coordinates."""
    left = [
        task.weights[plan.name].weight - solutions[plan.name].up.float() @ solutions[plan.name].down.float()
        for plan in task.plans
    ]
    return torch.cat(left) * _smooth(solutions)


def _with_codes(task: Task, solutions: Solutions, quantized: QuantizedWeight) -> Solutions:
    """`solutions` with the codes and scales of their stacked weight."""
    outers = [None] * len(task.counts) if quantized.outer is None else quantized.outer.split(task.counts)
    parts = zip(
        task.plans,
        quantized.codes.split(task.counts),
        quantized.scales.split(task.counts),
        outers,
        strict=True,
    )
    return {
        plan.name: replace(
            solutions[plan.name],
            codes=codes.contiguous(),
            scales=scales.contiguous(),
            outer=None if outer is None else outer[:1].clone(),
        )
        for plan, codes, scales, outer in parts
    }
