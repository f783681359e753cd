"""Rotated layers, searched: GPTQ of the rotated weight with the second moments of the rotated, quantized inputs.

All layers of an input are rounded as one matrix: they read the same numbers, so one Hessian serves them all. Scales of
rows are chosen first, so that what is rounded is a weight over them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.records import (
    HELD_OUT,
    LEVELS,
    ActivationStats,
    InputCovariance,
    RotatedPlan,
    RotatedSolution,
    SolveSettings,
)
from svdq_cli.solve.covariance import moments_of, trust
from svdq_cli.solve.forward import LinearWeights, relative_errors
from svdq_cli.solve.improve import LEAST_ROWS, StepResults
from svdq_cli.solve.quantizers import E4M3_MAX, E4M3_TINY, row_blocks
from svdq_cli.solve.rotation import MOST, MOST_8_BIT, fake_quantize_rows, levels_of, rotate
from svdq_cli.solve.rounding import NO_SEARCH, SCALE_FACTORS, Grid, Parameters, Rounded, gptq, nearest
from svdq_cli.solve.second_moments import quantized_moments, second_moments
from svdq_cli.solve.smoothing_methods import SEARCH_ROWS, evenly

# Of the scale with which a row's largest weight becomes 7. A rotated row is close to normal, of which few numbers are
# large: clipping those gains resolution for all others.
ROW_FACTORS = (1.0, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_TINY = 1e-10  # the least scale of a row, as the runtime has it for activations

Solutions = dict[str, RotatedSolution]


def solve_rotated(
    plans: Sequence[RotatedPlan],
    weights: Mapping[str, LinearWeights],
    rows: Tensor | None,
    settings: SolveSettings,
    mean: Tensor | None = None,
    covariance: InputCovariance | None = None,
) -> tuple[Solutions, StepResults]:
    """All rotated layers of one input, by name, and what the search brought. `rows` (M, K) float32, None for data-free.

    `mean` (K,): what the rows are less than the 16-bit model's; `covariance`: of more tokens, if any. Rounding by GPTQ
    is taken where it lowers the summed error on rows that it did not see.
    """
    rotated, scales = _prepared(plans, weights, searched="scales" in settings.steps or rows is None)
    results = StepResults({plan.name: {} for plan in plans})
    grid = _grid(plans[0], searched=True)
    start = _solutions(plans, weights, nearest(rotated, grid), scales, settings.dtype)
    if rows is None or "gptq" not in settings.steps:
        return start, results
    if len(rows) < LEAST_ROWS:
        results.fallback.append(
            f"{len(rows)} calibration rows, but {LEAST_ROWS} are needed to learn and to validate"
        )
        return start, results
    train, judge = rows.tensor_split([len(rows) * (HELD_OUT - 1) // HELD_OUT])

    def note(step: str, solutions: Solutions) -> float:
        errors = relative_errors(judge, solutions, weights, mean)
        for name, error in errors.items():
            results.errors[name][step] = error
        return sum(errors.values())

    least = note("start", start)
    began = time.monotonic()
    hessian = _hessian(train, plans[0], covariance)
    found = gptq(rotated, hessian, _grid(plans[0], searched="scales" in settings.steps))
    if found is None:
        results.fallback.append("gptq: no usable activations")
        return start, results
    tried = _solutions(plans, weights, found, scales, settings.dtype)
    better = note("gptq", tried) < least
    results.seconds["gptq"] = time.monotonic() - began
    if better:
        results.taken.append("gptq")
    return (tried if better else start), results


def _hessian(rows: Tensor, plan: RotatedPlan, covariance: InputCovariance | None) -> Tensor:
    """Second moments (K, K) of rotated, quantized inputs."""
    turned = rotate(rows, plan.rotation)
    quantized = fake_quantize_rows(turned, plan.activation_bits)
    if covariance is None:
        return second_moments(quantized)
    moments = moments_of(covariance, rows.new_ones(rows.shape[1]), trusted=trust(covariance))
    moments = rotate(rotate(moments, plan.rotation).T, plan.rotation)
    return quantized_moments(moments.contiguous(), turned, quantized)


def bit_errors(
    plans: Sequence[RotatedPlan],
    weights: Mapping[str, LinearWeights],
    stats: ActivationStats,
    settings: SolveSettings,
) -> dict[int, tuple[float, ...]]:
    """Noise over signal of each layer of an input, by bits of the activations, 4 and 8, with rounding to nearest."""
    rows = evenly(stats.rows.to(weights[plans[0].name].weight.device).float(), SEARCH_ROWS)
    errors: dict[int, tuple[float, ...]] = {}
    for bits in (4, 8):
        solutions, _ = solve_rotated(
            [replace(plan, activation_bits=bits) for plan in plans], weights, None, settings
        )
        found = relative_errors(rows, solutions, weights, stats.mean)
        errors[bits] = tuple(found[plan.name] for plan in plans)
    return errors


def _prepared(
    plans: Sequence[RotatedPlan], weights: Mapping[str, LinearWeights], *, searched: bool
) -> tuple[Tensor, Tensor]:
    """The rotated weights under one another, (sum of N, K), over their rows' scales, and these, (sum of N,)."""
    first = plans[0]
    count = sum(plan.linear.out_features for plan in plans)
    stack, scales, start = None, None, 0
    for plan in plans:
        weight = weights[plan.name].weight
        if stack is None or scales is None:
            stack, scales = weight.new_empty(count, weight.shape[1]), weight.new_empty(count)
        for rows in row_blocks(weight):
            part = rotate(weight[rows], first.rotation)
            scale = _row_scales(part, first, searched=searched)
            into = slice(start + rows.start, start + rows.start + len(part))
            stack[into], scales[into] = part / scale.unsqueeze(1), scale
        start += len(weight)
        del weight
    assert stack is not None
    assert scales is not None
    return stack, scales


def _row_scales(rotated: Tensor, plan: RotatedPlan, *, searched: bool) -> Tensor:
    """The scale of each row (N,): of 8-bit integers, or of 4-bit codes the one that loses least to rounding."""
    peak = rotated.abs().amax(1).clamp(min=_TINY)
    if plan.activation_bits == 8:
        return peak / MOST_8_BIT
    factors = ROW_FACTORS if searched else NO_SEARCH
    errors = []
    for share in factors:
        scale = (peak * (share / MOST)).unsqueeze(1)
        exact = rotated / scale
        lost = exact.round().clamp_(-MOST, MOST).sub_(exact).mul_(scale)
        errors.append(torch.linalg.vector_norm(lost, dim=1))
    best = torch.stack(errors).argmin(0)
    return peak * rotated.new_tensor(factors)[best] / MOST


def _grid(plan: RotatedPlan, *, searched: bool) -> Grid:
    if plan.activation_bits == 4:
        return IntegerGrid()
    return LevelGrid(SCALE_FACTORS if searched else NO_SEARCH)


def _solutions(
    plans: Sequence[RotatedPlan],
    weights: Mapping[str, LinearWeights],
    rounded: Rounded,
    scales: Tensor,
    dtype: torch.dtype,
) -> Solutions:
    """The layers as they are stored, from the rows of them all under one another."""
    counts = [plan.linear.out_features for plan in plans]
    found: Solutions = {}
    parts = zip(
        plans,
        rounded.codes.split(counts),
        rounded.parameters[0].split(counts) if plans[0].activation_bits == 8 else [None] * len(plans),
        scales.split(counts),
        strict=True,
    )
    for plan, codes, groups, row_scales in parts:
        bias = weights[plan.name].bias
        found[plan.name] = RotatedSolution(
            plan=plan,
            codes=codes.contiguous(),
            scales=row_scales.unsqueeze(1).clone() if groups is None else groups.contiguous(),
            row_scales=None if groups is None else row_scales.clone(),
            bias=None if bias is None else bias.to(dtype),
        )
    return found


# ------------------------------------------------------------------------------------------------- the grids


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """The integers -7 to 7: 4-bit codes of a weight over its rows' scales."""

    group: int = 64

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        yield (values.new_ones(len(values)),)

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        codes = values.round().clamp_(-MOST, MOST)
        return codes.to(torch.int8), codes

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        return values.new_zeros(len(values))  # of one candidate

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> None:
        return None


@dataclass(frozen=True, slots=True)
class LevelGrid:
    """round(level * scale), one of 16 levels, the scale e4m3: 8-bit integers from 4-bit codes, of a weight over its
    rows' scales."""

    factors: tuple[float, ...] = SCALE_FACTORS
    group: int = RotatedPlan.group

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        peak = values.abs().amax(1)
        for share in self.factors:
            yield (_e4m3(peak * share),)

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        scale = parameters[0].float()
        codes = _nearest_levels(values / scale)
        return codes.to(torch.int8), levels_of(codes, scale)

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        scale = parameters[0].float().unsqueeze(1)
        lost = levels_of(_nearest_levels(values / scale), scale).sub_(values)
        return torch.linalg.vector_norm(lost if importance is None else lost.mul_(importance), dim=1)

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Parameters:
        levels = values.new_tensor(LEVELS)[_nearest_levels(values / parameters[0].float().unsqueeze(1))]
        weight = levels if importance is None else levels * importance.square()
        return (_e4m3((values * weight).sum(1) / (levels * weight).sum(1)),)


def _e4m3(scale: Tensor) -> Tensor:
    return scale.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def _nearest_levels(shares: Tensor) -> Tensor:
    """The index of the level that is nearest to each share of a scale. Of any shape, which stays."""
    levels = shares.new_tensor(LEVELS)
    return torch.bucketize(shares.contiguous(), (levels[1:] + levels[:-1]) / 2, out_int32=True)
