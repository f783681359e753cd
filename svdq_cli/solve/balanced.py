"""Effort `balanced`: learned smoothing, GPTQ rounding, refitted branch. Better images from the same bytes.

Every step is judged on rows that it did not see; a step that does not pay is not taken, so the result is never worse
there than the paper's search that it starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.records import Precision, W4A4Plan, W4A4Solution
from svdq_cli.solve.forward import SourceWeight, dequantized_weight, relative_errors
from svdq_cli.solve.learned import learn_smoothing
from svdq_cli.solve.low_rank import split_low_rank
from svdq_cli.solve.quantizers import fake_quantize_activation
from svdq_cli.solve.refit import RIDGE, refit_branch
from svdq_cli.solve.rounding import gptq_weight

HELD_OUT = 8  # every eighth row judges
LEAST_ROWS = 64  # with fewer there is nothing to learn from and nothing to judge on


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The layers of one shared input, split by branch, with what they are judged on."""

    branches: tuple[tuple[W4A4Plan, ...], ...]
    weights: Mapping[str, SourceWeight]
    rows: Tensor  # (M, K) float32
    dtype: torch.dtype
    seed: int

    @property
    def plans(self) -> tuple[W4A4Plan, ...]:
        return tuple(plan for branch in self.branches for plan in branch)

    @property
    def precision(self) -> Precision:
        return self.plans[0].precision

    def stacked(self, branch: Sequence[W4A4Plan]) -> Tensor:
        """The branch's weights under one another, (sum of N, K)."""
        return torch.cat([self.weights[plan.name].weight for plan in branch])


Solutions = dict[str, W4A4Solution]


def improve(
    task: Task,
    start: Solutions,
    *,
    place: Callable[[Tensor], Tensor],
    nearest: Callable[[Tensor], Solutions],
) -> tuple[Solutions, dict[str, dict[str, float]]]:
    """Better solutions than `start`, and the held-out relative error of each layer after each step that was tried.

    `place(s)` brings a smoothing factor to its stored form (range, size, 16 bits); `nearest(s)` solves for one with
    rounding to nearest.
    """
    if task.rows.shape[0] < LEAST_ROWS:
        return start, {}
    judge = task.rows[::HELD_OUT]
    train = task.rows[torch.arange(len(task.rows), device=task.rows.device) % HELD_OUT != 0]
    trail: dict[str, dict[str, float]] = {plan.name: {} for plan in task.plans}

    def judged(step: str, solutions: Solutions) -> float:
        errors = relative_errors(judge, solutions, task.weights)
        for name, error in errors.items():
            trail[name][step] = error
        return sum(errors.values())

    best, best_error = start, judged("grid", start)
    smooth = place(_learned(task, train, next(iter(start.values())).smooth.float()))
    for step, take in (
        ("learned", lambda _: nearest(smooth)),
        ("gptq", lambda so_far: _round_all(task, train, so_far)),
        ("refit", lambda so_far: _refit_all(task, train, so_far)),
    ):
        tried = take(best)
        if (error := judged(step, tried)) < best_error:
            best, best_error = tried, error
    return best, trail


def _learned(task: Task, train: Tensor, start: Tensor) -> Tensor:
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
    return learn_smoothing(start, weight, train, task.precision, branch=branch, seed=task.seed)


def _round_all(task: Task, train: Tensor, solutions: Solutions) -> Solutions:
    """The same branches, their residuals rounded by GPTQ. All layers see one input, so one Hessian serves all."""
    smooth = next(iter(solutions.values())).smooth.float()
    drawn = fake_quantize_activation(train / smooth, task.precision)
    hessian = drawn.T @ drawn / len(drawn)
    residuals = [
        (task.weights[p.name].weight - solutions[p.name].up.float() @ solutions[p.name].down.float()) * smooth
        for p in task.plans
    ]
    counts = tuple(plan.linear.out_features for plan in task.plans)
    quantized = gptq_weight(torch.cat(residuals), hessian, task.precision, dtype=task.dtype, parts=counts)
    outers = [None] * len(counts) if quantized.outer is None else quantized.outer.split(counts)
    parts = zip(
        task.plans, quantized.codes.split(counts), quantized.scales.split(counts), outers, strict=True
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


def _refit_all(task: Task, train: Tensor, solutions: Solutions) -> Solutions:
    """New branches for the codes there are, fitted in smoothed coordinates, where channels are of one size."""
    refitted = dict(solutions)
    for members in task.branches:
        smooth = solutions[members[0].name].smooth.float()
        down = solutions[members[0].name].down.float()
        x = train / smooth
        drawn = fake_quantize_activation(x, task.precision)
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
    return refitted
