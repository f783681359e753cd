"""How a layer group's smoothing factor is found: one record a method.

A new method is a name in `records.Smoothing` and a record here: recipes take the name from there, `solve_input` and the
search for ranks run it, `--plan` counts what it tries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from svdq_cli.records import ActivationStats, Precision, SharedInput, Smoothing, SolveSettings, W4A4Plan
from svdq_cli.solve.forward import LinearWeights, stacked_weights
from svdq_cli.solve.low_rank import SEARCH_POWER_ITERATIONS, split_low_rank
from svdq_cli.solve.quantizers import fake_quantize_activation, fake_quantize_weight
from svdq_cli.solve.smoothing import CLOSED_FORM, GRID, smooth_factor
from svdq_cli.system.threads import end_if_left

# Rows, and outputs of each layer, that score a factor; the ranking is stable long before the report's figure is
SEARCH_ROWS = 512
SEARCH_OUTPUTS = 512


@dataclass(frozen=True, slots=True, eq=False)
class SmoothingTask:
    """One layer group whose smoothing factor is wanted. `rows` (M, K) float32, on the device of the weights."""

    shared: SharedInput
    plans: Sequence[W4A4Plan]
    weights: Mapping[str, LinearWeights]
    stats: ActivationStats
    rows: Tensor
    settings: SolveSettings

    @property
    def precision(self) -> Precision:
        return self.plans[0].precision

    def factors(self) -> Callable[[tuple[float, float]], Tensor]:
        """The factor (K,) of two exponents, as it is stored."""
        x_peak = self.stats.abs_max.to(self.rows.device).float()
        w_peak = torch.stack([self.weights[plan.name].weight.abs().amax(0) for plan in self.plans]).amax(0)
        inverted = self.plans[0].branchless
        return lambda exponents: smooth_factor(
            x_peak, w_peak, exponents, self.precision, dtype=self.settings.dtype, inverted=inverted
        )


@dataclass(frozen=True, slots=True)
class SmoothingMethod:
    """`find` returns the factor (K,) float32, exact in 16 bits, and how it was found, in words. `tried`: factors that
    it scores on the calibration rows, which is what it costs; a method without any needs peaks alone."""

    find: Callable[[SmoothingTask], tuple[Tensor, str]]
    tried: int = 0


def choose_smoothing(
    shared: SharedInput,
    plans: Sequence[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    stats: ActivationStats | None,
    rows: Tensor | None,
    settings: SolveSettings,
) -> tuple[Tensor, str]:
    """The smoothing factor (K,) float32, exact in 16 bits, and how it was found."""
    if stats is None or rows is None:
        device = next(iter(weights.values())).weight.device
        return torch.ones(plans[0].linear.in_features, device=device, dtype=torch.float32), "none (data-free)"
    task = SmoothingTask(shared, plans, weights, stats, rows, settings)
    return SMOOTHING_METHODS[settings.smoothing].find(task)


def _none(task: SmoothingTask) -> tuple[Tensor, str]:
    return task.factors()((0.0, 0.0)), "none"


def _closed_form(task: SmoothingTask) -> tuple[Tensor, str]:
    return task.factors()(CLOSED_FORM), "closed-form"


def _grid(task: SmoothingTask) -> tuple[Tensor, str]:
    """The exponents of the paper's grid with the least output error, all branches together."""
    factor, sample = task.factors(), evenly(task.rows, SEARCH_ROWS)
    errors = [0.0] * len(GRID)
    for members in task.shared.members(task.plans):
        judged = _judged_outputs(members, task.weights, sample)
        for index, point in enumerate(GRID):
            end_if_left()
            errors[index] += _search_error(judged, factor(point), sample, task)
        del judged  # before the next one is made
    best = min(range(len(GRID)), key=errors.__getitem__)
    a, b = GRID[best]
    return factor(GRID[best]), f"grid a={a:.2f} b={b:.2f}"


SMOOTHING_METHODS: Mapping[Smoothing, SmoothingMethod] = {
    "none": SmoothingMethod(_none),
    "closed-form": SmoothingMethod(_closed_form),
    "grid": SmoothingMethod(_grid, tried=len(GRID)),
}


@dataclass(frozen=True, slots=True, eq=False)
class _JudgedOutputs:
    """The outputs of a branch's layers that score a factor, and all weights of the branch, which it is found from."""

    weights: Sequence[Tensor]  # (N_i, K)
    chosen: Tensor  # which rows of them, under one another
    stack: Stack  # of these alone


def _judged_outputs(
    members: Sequence[W4A4Plan], weights: Mapping[str, LinearWeights], rows: Tensor
) -> _JudgedOutputs:
    sources = [weights[plan.name].weight for plan in members]
    own = [evenly(torch.arange(len(each), device=rows.device), SEARCH_OUTPUTS) for each in sources]
    some = torch.cat([source[each] for source, each in zip(sources, own, strict=True)])
    first = [0, *accumulate(map(len, sources))]
    chosen = torch.cat([each + before for each, before in zip(own, first, strict=False)])
    return _JudgedOutputs(sources, chosen, _stack(members, some, list(map(len, own)), rows))


def _search_error(judged: _JudgedOutputs, smooth: Tensor, rows: Tensor, task: SmoothingTask) -> float:
    """Relative output error of all layers of a branch together, each weighing the same, for rounding to nearest."""
    stack, settings = judged.stack, task.settings
    quantized = fake_quantize_activation(rows / smooth, task.precision)
    up, down = split_low_rank(
        judged.weights,
        rank=stack.rank,
        seed=settings.seed,
        power_iterations=SEARCH_POWER_ITERATIONS,
        smooth=smooth,
    )
    up = up[judged.chosen]
    left_over = torch.addmm(stack.weight * smooth, up, down, alpha=-1)
    parts = [
        fake_quantize_weight(part, task.precision, dtype=settings.dtype)
        for part in left_over.split(stack.counts)
    ]
    return sum(stack.errors(quantized, torch.cat(parts), (rows / smooth) @ down.T, up))


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The layers of one branch under one another, and their exact output on the search rows."""

    layers: tuple[str, ...]
    weight: Tensor  # (sum of N, K)
    counts: list[int]
    outputs: Tensor  # (M, sum of N)
    signals: list[float]  # each layer's sum of squares in it
    rank: int

    def errors(self, activation: Tensor, four_bit: Tensor, hidden: Tensor, up: Tensor) -> tuple[float, ...]:
        """Noise over signal of each layer's output, `activation` (M, K) times `four_bit` (sum of N, K) and `hidden`
        (M, R) times `up` (sum of N, R)."""
        # Less the exact output, which is there: a candidate takes one large product, not one each for what is rounded
        # and for what that stands for
        lost = torch.addmm(self.outputs, hidden, up.T, beta=-1).addmm_(activation, four_bit.T)
        parts = zip(lost.split(self.counts, dim=1), self.signals, strict=True)
        return tuple(float(noise.square().sum()) / signal for noise, signal in parts)


def stacks_of(
    shared: SharedInput, plans: Sequence[W4A4Plan], weights: Mapping[str, LinearWeights], rows: Tensor
) -> Iterator[Stack]:
    """The branches one after the other; a caller that lets go of each has no more than one in memory. `rows` is (M,
    K)."""
    for members in shared.members(plans):
        counts = [plan.linear.out_features for plan in members]
        yield _stack(members, stacked_weights(members, weights), counts, rows)


def _stack(members: Sequence[W4A4Plan], weight: Tensor, counts: list[int], rows: Tensor) -> Stack:
    outputs = rows @ weight.T
    signals = [max(float(each.square().sum()), 1e-30) for each in outputs.split(counts, dim=1)]
    return Stack(tuple(plan.name for plan in members), weight, counts, outputs, signals, members[0].rank)


def evenly(rows: Tensor, count: int) -> Tensor:
    """Take at most `count` rows, evenly spaced. (M, K) -> (n, K)."""
    if rows.shape[0] <= count:
        return rows
    return rows[
        torch.linspace(0, rows.shape[0] - 1, count, device=rows.device, dtype=torch.float32).round().long()
    ]
