"""Steps beyond the paper's search: better images from the same bytes.

Learned smoothing, GPTQ rounding, a refitted branch. Every step is judged on rows that it did not see; a step that does
not pay is not taken, so the result is never worse there than the search it starts from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from svdq_cli.records import Precision, SearchStep, W4A4Plan, W4A4Solution
from svdq_cli.solve.forward import SourceWeight, dequantized_weight, relative_errors, stacked_weights
from svdq_cli.solve.learned import GPTQ_LEAVES, learn_smoothing
from svdq_cli.solve.low_rank import split_low_rank
from svdq_cli.solve.quantizers import QuantizedWeight, fake_quantize_activation
from svdq_cli.solve.refit import refit_branch, ridge_for
from svdq_cli.solve.rounding import NO_SEARCH, SCALE_FACTORS, gptq_weight
from svdq_cli.solve.second_moments import second_moments
from svdq_cli.system.threads import end_if_left

HELD_OUT = 8  # one row in eight validates: the last ones, which come from images that the others do not
LEAST_ROWS = 64  # with fewer there is nothing to learn from and nothing to judge on


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The layers of one shared input, split by branch, with what they are judged on."""

    branches: tuple[tuple[W4A4Plan, ...], ...]
    weights: Mapping[str, SourceWeight]
    rows: Tensor  # (M, K) float32, in the order in which images were generated
    dtype: torch.dtype
    seed: int
    mean: Tensor | None = None  # (K,): what the rows are less than the 16-bit model's

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
        return stacked_weights(branch, self.weights)


Solutions = dict[str, W4A4Solution]


@dataclass(frozen=True, slots=True)
class Trail:
    """What the steps brought, in the order in which they were tried."""

    # layer -> step -> held-out noise over signal
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # step -> for all layers of the input
    taken: list[SearchStep] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)  # why steps were left out, in words


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
            f"{task.rows.shape[0]} calibration rows, but {LEAST_ROWS} are needed to learn and to validate"
        )
        return start, trail
    train, judge = task.rows.tensor_split([task.rows.shape[0] * (HELD_OUT - 1) // HELD_OUT])

    def judged(solutions: Solutions) -> dict[str, float]:
        return relative_errors(judge, solutions, task.weights, task.mean)

    def note(step: str, errors: Mapping[str, float]) -> float:
        for name, error in errors.items():
            trail.errors[name][step] = error
        return sum(errors.values())

    best, least = start, note("start", judged(start))
    attempts: dict[SearchStep, Callable[[], Solutions | None]] = {
        "learned": lambda: _learned(
            task, train, best, place, nearest, GPTQ_LEAVES if "gptq" in steps else 1.0
        ),
        "gptq": lambda: _rounded(task, train, best, SCALE_FACTORS if "scales" in steps else NO_SEARCH),
        "refit": lambda: _refitted(task, train, best),
    }
    for step in steps:
        if step not in attempts:
            continue  # scales are taken with gptq, means were moved before
        end_if_left()
        began = time.monotonic()
        tried = attempts[step]()
        if tried is None:
            trail.fallback.append(f"{step}: no usable activations")
        elif (reached := note(step, judged(tried))) < least:
            best, least = tried, reached
            trail.taken.append(step)
        trail.seconds[step] = time.monotonic() - began
    return best, trail


# Each step returns what it would have instead of the best so far, or None where there is nothing to go by.


def _learned(
    task: Task,
    train: Tensor,
    best: Solutions,
    place: Callable[[Tensor], Tensor],
    nearest: Callable[[Tensor], Solutions],
    weight_noise: float,
) -> Solutions:
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
    start = _smooth(best)
    learned = learn_smoothing(
        start, weight, train, task.precision, branch=branch, weight_noise=weight_noise, seed=task.seed
    )
    return nearest(place(learned))


def _rounded(task: Task, train: Tensor, best: Solutions, factors: tuple[float, ...]) -> Solutions | None:
    """The branches with their residual rounded by GPTQ with `factors` for the groups' scales. All layers see one
    input, so one Hessian serves all."""
    drawn = fake_quantize_activation(train / _smooth(best), task.precision)
    hessian = second_moments(drawn)
    left = _residual(task, best)
    quantized = gptq_weight(
        left, hessian, task.precision, dtype=task.dtype, parts=task.counts, factors=factors
    )
    return None if quantized is None else _with_codes(task, best, quantized)


def _refitted(task: Task, train: Tensor, best: Solutions) -> Solutions | None:
    """New branches for the codes there are, fitted in smoothed coordinates, where channels are of one size."""
    refitted: Solutions = {}
    smooth = _smooth(best)
    x = train / smooth
    drawn = fake_quantize_activation(x, task.precision)
    for members in task.branches:
        down = best[members[0].name].down.float()
        ups = torch.cat([best[plan.name].up.float() for plan in members])
        product = (ups @ down) * smooth
        four_bit = torch.cat([dequantized_weight(best[plan.name]) for plan in members])
        missing = train @ task.stacked(members).T - drawn @ four_bit.T - x @ product.T
        found = refit_branch(x, missing, product, rank=members[0].rank, ridge=ridge_for(x), seed=task.seed)
        if found is None:
            continue
        up, new_down = found[0].to(task.dtype), (found[1] / smooth).to(task.dtype).contiguous()
        for plan, rows in zip(members, up.split([plan.linear.out_features for plan in members]), strict=True):
            refitted[plan.name] = replace(best[plan.name], down=new_down, up=rows.contiguous())
    return {**best, **refitted} if refitted else None


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
