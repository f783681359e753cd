"""The steps of the search beyond the paper's: each one record with what it does and what it costs.

A new step is a name in `records.SearchStep`, which says its place, and a record here: recipes take the name from there,
`improve` runs it, `--plan` counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.records import (
    InputCovariance,
    NvFp4,
    Precision,
    SearchStep,
    SolveSettings,
    W4A4Plan,
    W4A4Solution,
)
from svdq_cli.solve.covariance import moments_of, trust
from svdq_cli.solve.forward import LinearWeights, dequantized_weight, stacked_weights
from svdq_cli.solve.learned import GPTQ_LEAVES, OUTPUTS_PER_STEP, ROWS_PER_STEP, learn_smoothing
from svdq_cli.solve.learned import STEPS as LEARNING_STEPS
from svdq_cli.solve.low_rank import OVERSAMPLE, SEARCH_POWER_ITERATIONS, split_low_rank
from svdq_cli.solve.quantizers import QuantizedWeight, fake_quantize_activation
from svdq_cli.solve.refine import held_bytes, refined, round_work
from svdq_cli.solve.refit import refit_branch, refit_inputs
from svdq_cli.solve.rounding import NO_SEARCH, SCALE_FACTORS, gptq_weight
from svdq_cli.solve.second_moments import quantized_moments, second_moments
from svdq_cli.solve.smoothing_methods import SEARCH_ROWS, evenly
from svdq_cli.solve.work import Shapes, Work, split_work


@dataclass(frozen=True, slots=True, eq=False)
class LayerGroup:
    """The layers of one shared input, split by branch, with what they are judged on."""

    branches: tuple[tuple[W4A4Plan, ...], ...]
    weights: Mapping[str, LinearWeights]
    rows: Tensor  # (M, K) float32, in the order in which images were generated
    dtype: torch.dtype
    seed: int
    mean: Tensor | None = None  # (K,): what the rows are less than the 16-bit model's
    refinements: int = 0  # of branch and codes, at most
    covariance: InputCovariance | None = None

    @property
    def plans(self) -> tuple[W4A4Plan, ...]:
        return tuple(plan for branch in self.branches for plan in branch)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(plan.linear.out_features for plan in self.plans)

    @property
    def precision(self) -> Precision:
        return self.plans[0].precision

    @property
    def scaled_together(self) -> tuple[int, ...]:
        """Rows that share an nvfp4 outer scale: those of a layer, and of all where there are no branches."""
        return (sum(self.counts),) if self.plans[0].branchless else self.counts

    def stacked(self, branch: Sequence[W4A4Plan]) -> Tensor:
        """The branch's weights under one another, (sum of N, K)."""
        return stacked_weights(branch, self.weights)


Solutions = dict[str, W4A4Solution]


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """What a step starts from. `train`: the rows (M, K) that it may look at. `steps`: all that are wanted. `place(s)`
    brings a smoothing factor (K,) to its stored form, `round_to_nearest(s)` solves for one with rounding to nearest."""

    layer_group: LayerGroup
    train: Tensor
    best: Solutions
    steps: Sequence[SearchStep]
    place: Callable[[Tensor], Tensor]
    round_to_nearest: Callable[[Tensor], Solutions]


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """The layers of one input as costs see them. `train`: rows; `final`: the work of solving with nearest rounding;
    `refinements`: of branch and codes."""

    shapes: Shapes
    width: int
    train: int
    final: Work
    precision: Precision
    refinements: int = 0

    @property
    def size(self) -> int:
        return self.width * sum(count for count, _ in self.shapes)

    @property
    def dear(self) -> bool:
        """Whether steps take more operations than int4's, by which they are measured."""
        return isinstance(self.precision, NvFp4)


@dataclass(frozen=True, slots=True)
class StepMatrices:
    """Sizes of what a step has in memory. `outputs`: N of all layers of the input; `branch`: N of its largest branch;
    `width`: K; `rows`: M; `at_once`: numbers that are rounded at a time."""

    outputs: int
    branch: int
    width: int
    rows: int
    rank: int
    precision: Precision
    at_once: int


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the search. `run` returns what it would have instead of the best so far, or None where there is nothing
    to go by; a step without `run` is taken elsewhere: with another one, or before the layers are solved. `work` and
    `bytes` are what it costs: operations, and memory besides the weights at its peak."""

    run: Callable[[Attempt], Solutions | None] | None
    work: Callable[[LayerSizes], Work]
    bytes: Callable[[StepMatrices], int]


def _learned(attempt: Attempt) -> Solutions:
    """Each layer weighs the same: its rows are scaled by the size of its output."""
    layer_group, train, best = attempt.layer_group, attempt.train, attempt.best
    weight_noise = GPTQ_LEAVES if "gptq" in attempt.steps else 1.0
    some = evenly(train, SEARCH_ROWS)
    shares = torch.cat(
        [
            (some @ layer_group.weights[plan.name].weight.T)
            .square()
            .mean()
            .clamp(min=1e-30)
            .rsqrt()
            .expand(plan.linear.out_features)
            for plan in layer_group.plans
        ]
    ).unsqueeze(1)

    def branch(smooth: Tensor) -> Tensor:
        parts = []
        for members in layer_group.branches:
            up, down = split_low_rank(
                layer_group.stacked(members) * smooth,
                rank=members[0].rank,
                seed=layer_group.seed,
                power_iterations=1,
            )
            parts.append(up @ (down / smooth))
        return torch.cat(parts) * shares

    weight = torch.cat([layer_group.stacked(members) for members in layer_group.branches]) * shares
    start = _smooth(best)
    learned = learn_smoothing(
        start,
        weight,
        train,
        layer_group.precision,
        branch=branch,
        weight_noise=weight_noise,
        seed=layer_group.seed,
    )
    return attempt.round_to_nearest(attempt.place(learned))


def _refined(attempt: Attempt) -> Solutions:
    """Branches and codes, rounded to nearest, fitted to each other in smoothed coordinates. GPTQ then has less to lose:
    what such a branch leaves of the weights is nearer to numbers of 4 bits."""
    layer_group, best = attempt.layer_group, attempt.best
    solved: Solutions = {}
    for members in layer_group.branches:
        found = refined(
            [layer_group.weights[plan.name].weight for plan in members],
            rank=members[0].rank,
            seed=layer_group.seed,
            precision=layer_group.precision,
            dtype=layer_group.dtype,
            rounds=layer_group.refinements,
            smooth=_smooth(best),
            anew=True,
        )
        ups = found.up.split([plan.linear.out_features for plan in members])
        for plan, up, quantized in zip(members, ups, found.codes, strict=True):
            solved[plan.name] = replace(
                best[plan.name],
                down=found.down,
                up=up.contiguous(),
                codes=quantized.codes,
                scales=quantized.scales,
                outer=quantized.outer,
            )
    return {plan.name: solved[plan.name] for plan in layer_group.plans}


def _rounded(attempt: Attempt) -> Solutions | None:
    """The branches with their residual rounded by GPTQ, with a search of the groups' scales where that is wanted
    too. All layers see one input, so one Hessian serves all."""
    layer_group, best = attempt.layer_group, attempt.best
    factors = SCALE_FACTORS if "scales" in attempt.steps else NO_SEARCH
    smooth = _smooth(best)
    x = attempt.train / smooth
    activation = fake_quantize_activation(x, layer_group.precision)
    if layer_group.covariance is None:
        hessian = second_moments(activation)
    else:
        moments = moments_of(layer_group.covariance, 1 / smooth, trusted=trust(layer_group.covariance))
        hessian = quantized_moments(moments, x, activation)
    del x, activation
    left = _residual(layer_group, best)
    quantized = gptq_weight(
        left,
        hessian,
        layer_group.precision,
        dtype=layer_group.dtype,
        parts=layer_group.scaled_together,
        factors=factors,
    )
    return None if quantized is None else _with_codes(layer_group, best, quantized)


def _refitted(attempt: Attempt) -> Solutions | None:
    """New branches for the codes there are, fitted in smoothed coordinates, where channels are of one size."""
    layer_group, best = attempt.layer_group, attempt.best
    smooth = _smooth(best)
    x = attempt.train / smooth
    inputs = refit_inputs(x, fake_quantize_activation(x, layer_group.precision))
    if inputs is None:
        return None
    refitted: Solutions = {}
    for members in layer_group.branches:
        up, down = refit_branch(
            inputs,
            layer_group.stacked(members).mul_(smooth),
            torch.cat([dequantized_weight(best[plan.name]) for plan in members]),
            torch.cat([best[plan.name].up.float() for plan in members]),
            best[members[0].name].down.float() * smooth,
            seed=layer_group.seed,
        )
        down = (down / smooth).to(layer_group.dtype).contiguous()
        ups = up.to(layer_group.dtype).split([plan.linear.out_features for plan in members])
        for plan, rows in zip(members, ups, strict=True):
            refitted[plan.name] = replace(best[plan.name], down=down, up=rows.contiguous())
    return {plan.name: refitted[plan.name] for plan in layer_group.plans}


def _smooth(solutions: Solutions) -> Tensor:
    return next(iter(solutions.values())).smooth.float()


def _residual(layer_group: LayerGroup, solutions: Solutions) -> Tensor:
    """What the stored branches leave over, (sum of N, K), in smoothed coordinates."""
    left = [
        layer_group.weights[plan.name].weight
        - solutions[plan.name].up.float() @ solutions[plan.name].down.float()
        for plan in layer_group.plans
    ]
    return torch.cat(left) * _smooth(solutions)


def _with_codes(layer_group: LayerGroup, solutions: Solutions, quantized: QuantizedWeight) -> Solutions:
    """`solutions` with the codes and scales of their stacked weight."""
    outers = (
        [None] * len(layer_group.counts)
        if quantized.outer is None
        else quantized.outer.split(layer_group.counts)
    )
    parts = zip(
        layer_group.plans,
        quantized.codes.split(layer_group.counts),
        quantized.scales.split(layer_group.counts),
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


def _learned_work(sizes: LayerSizes) -> Work:
    branches = split_work(sizes.shapes, sizes.width, SEARCH_POWER_ITERATIONS) * 2
    steps = Work(
        matmul=2 * min(sizes.train, SEARCH_ROWS) * sizes.size,
        learned=(1.6 if sizes.dear else 1) * sizes.width * LEARNING_STEPS,
        calls=80 * LEARNING_STEPS,
    )
    return steps + branches + sizes.final


def _refine_work(sizes: LayerSizes) -> Work:
    return round_work(sizes.shapes, sizes.width, sizes.precision, anew=True) * (1 + sizes.refinements)


def _gptq_work(sizes: LayerSizes) -> Work:
    width, size, train = sizes.width, sizes.size, sizes.train
    update = size * width  # each block of columns is taken from all that follow
    return Work(
        matmul=2 * train * width**2 + update,
        quantized=train * width,
        gptq=3 * size if sizes.dear else size,
        factored=3 * width**3,
        calls=(90 if sizes.dear else 30) * width,
    )


def _refit_work(sizes: LayerSizes) -> Work:
    width, size, train = sizes.width, sizes.size, sizes.train
    total = Work(matmul=2 * train * width**2, quantized=train * width + 2 * size, factored=width**3 / 3)
    for n, rank in sizes.shapes:
        products = 2 * (3 * train * width + 2 * n * width + 2 * width**2) * 2 * rank
        total += Work(matmul=2 * n * width * rank, sketch=products, bases=8 * (n + 5 * width) * rank**2)
    return total


def _learned_bytes(held: StepMatrices) -> int:
    n, k = held.outputs, held.width
    # Each with its gradients
    sampled = min(held.rows, ROWS_PER_STEP) + min(n, OUTPUTS_PER_STEP)
    return max(24 * n * k, 8 * n * k + 22 * sampled * k)


def _refine_bytes(held: StepMatrices) -> int:
    # The best codes there were stay beside those of the rounds
    made = held.outputs * held.width
    return made + held_bytes(held.precision, held.branch, held.width, held.rank + OVERSAMPLE, held.at_once)


def _gptq_bytes(held: StepMatrices) -> int:
    return 20 * held.width**2 + 12 * held.outputs * held.width


def _refit_bytes(held: StepMatrices) -> int:
    branch, k, rows = held.branch, held.width, held.rows
    # The moments and their root; then this beside the weight and, twice for a moment, what the codes represent
    found = max(8 * k * k, 4 * k * k + 12 * branch * k)
    return max(16 * rows * k, 8 * rows * k + found)


def _no_work(sizes: LayerSizes) -> Work:
    return Work()


def _no_bytes(held: StepMatrices) -> int:
    return 0


STEPS: Mapping[SearchStep, Step] = {
    # `conversion.move_means` does it; a sum over the rows
    "means": Step(None, _no_work, _no_bytes),
    "learned": Step(_learned, _learned_work, _learned_bytes),
    "refine": Step(_refined, _refine_work, _refine_bytes),
    "gptq": Step(_rounded, _gptq_work, _gptq_bytes),
    # gptq does it, and is measured with it
    "scales": Step(None, _no_work, _no_bytes),
    "refit": Step(_refitted, _refit_work, _refit_bytes),
    # `conversion.block_by_block` does it, once all layers are solved
    "output": Step(None, _no_work, _no_bytes),
}


def steps_for(settings: SolveSettings, *, branched: bool) -> tuple[SearchStep, ...]:
    """The steps that layers are solved with: without branches there are none to fit."""
    left_out: set[SearchStep] = set() if branched else {"refine", "refit"}
    if not settings.refinements:
        left_out.add("refine")
    return tuple(step for step in settings.steps if step not in left_out)
