"""One shared input, solved: its smoothing factor, then the low-rank branch and the codes of every layer.

    y = x W^T + b  ~  qa(x / s) . dequant(Q)^T + (x D^T) U^T + b

All layers of a shared input are scored together; the layers of one branch share D (SVDQuant, arXiv 2411.05007,
sections 4.2 and 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.errors import UsageError
from svdq_cli.records import (
    ActivationStats,
    LayerPlan,
    LayerReport,
    LayerSearch,
    LayerSolution,
    RotatedPlan,
    RotatedSolution,
    SharedInput,
    SolveSettings,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.solve.forward import MEASURED_ROWS, LinearWeights, output_sqnr_db, stacked_weights
from svdq_cli.solve.improve import StepResults, improve
from svdq_cli.solve.low_rank import split_low_rank
from svdq_cli.solve.modulation import solve_curve, solve_w4a16
from svdq_cli.solve.quantizers import QuantizedWeight, quantize_weight
from svdq_cli.solve.rebuild import Residual, relative_error
from svdq_cli.solve.refine import refined
from svdq_cli.solve.rotated import solve_rotated
from svdq_cli.solve.smoothing import snap_to_storage
from svdq_cli.solve.smoothing_methods import choose_smoothing, evenly
from svdq_cli.solve.steps import LayerGroup, steps_for


@dataclass(frozen=True, slots=True, eq=False)
class SolvedInput:
    """All layers of one shared input."""

    w4a4: tuple[W4A4Solution, ...]
    w4a16: tuple[W4A16Solution, ...]
    rotated: tuple[RotatedSolution, ...]
    reports: tuple[LayerReport, ...]

    @property
    def solutions(self) -> tuple[LayerSolution, ...]:
        return (*self.w4a4, *self.w4a16, *self.rotated)


def solve_input(
    shared: SharedInput,
    plans: Mapping[str, LayerPlan],
    weights: Mapping[str, LinearWeights],
    stats: ActivationStats | None,
    settings: SolveSettings,
) -> SolvedInput:
    """Solve every layer that reads one activation. `stats` None means data-free: no smoothing, weight errors only."""
    w4a4_plans = [plan for name in shared.layers if isinstance(plan := plans[name], W4A4Plan)]
    curves = [plan for plan in w4a4_plans if plan.curve]
    w4a16_plans = [plan for name in shared.layers if isinstance(plan := plans[name], W4A16Plan)]
    rotated_plans = [plan for name in shared.layers if isinstance(plan := plans[name], RotatedPlan)]
    rows = None if stats is None else stats.rows.to(_device(weights)).float()
    mean = None if stats is None else stats.mean
    solved: list[tuple[LayerSolution, LayerSearch]] = []
    if len(curves) < len(w4a4_plans):
        smoothed = [plan for plan in w4a4_plans if not plan.curve]
        solved += _searched(shared, smoothed, weights, stats, rows, settings)
    for plan in curves:
        solution = _curve(plan, weights[plan.name], stats, settings)
        solved.append((solution, _without_search(solution, plan.rank, "none (curve)")))
    if rotated_plans:
        covariance = None if stats is None else stats.covariance
        rotated, results = solve_rotated(rotated_plans, weights, rows, settings, mean, covariance)
        solved += ((each, _as_found(each, results, stats)) for each in rotated.values())
    for plan in w4a16_plans:
        source = weights[plan.name]
        known = rows if "gptq" in settings.steps else None
        solution = solve_w4a16(plan, source.weight, source.bias, dtype=settings.dtype, rows=known)
        solved.append((solution, _without_search(solution)))
    return SolvedInput(
        tuple(each for each, _ in solved if isinstance(each, W4A4Solution)),
        tuple(each for each, _ in solved if isinstance(each, W4A16Solution)),
        tuple(each for each, _ in solved if isinstance(each, RotatedSolution)),
        tuple(
            LayerReport(each.plan.name, *measured(each, weights[each.plan.name], rows, mean), search)
            for each, search in solved
        ),
    )


def _searched(
    shared: SharedInput,
    plans: list[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    stats: ActivationStats | None,
    rows: Tensor | None,
    settings: SolveSettings,
) -> Iterator[tuple[W4A4Solution, LayerSearch]]:
    """The W4A4 layers of an input, which share its smoothing factor, and how each was found. `rows` (M, K)."""
    smooth, label = choose_smoothing(shared, plans, weights, stats, rows, settings)
    if stats is None and not plans[0].branchless:
        solutions = _solve_data_free(shared, plans, weights, settings)
    else:
        solutions = _solve_w4a4(shared, plans, weights, smooth, settings)
    step_results = StepResults()
    if settings.steps and stats is not None and rows is not None:
        solutions, step_results = _improve(shared, plans, weights, stats, rows, settings, solutions)
    for solution in solutions.values():
        yield solution, _as_found(solution, step_results, stats, solution.plan.rank, label)


def _as_found(
    solution: LayerSolution,
    results: StepResults,
    stats: ActivationStats | None,
    rank: int | None = None,
    smoothing: str | None = None,
) -> LayerSearch:
    errors = results.errors.get(solution.plan.name, {})
    covariance = stats.covariance if stats and "gptq" in results.taken else None
    return LayerSearch(
        rank=rank,
        smoothing=smoothing,
        steps_db={step: round(_decibels(error), 3) for step, error in errors.items()},
        steps_seconds=results.seconds,
        steps_taken=tuple(results.taken),
        fallback=tuple(results.fallback),
        device=solution.codes.device.type,
        covariance_tokens=covariance.tokens if covariance else 0,
    )


def _without_search(
    solution: LayerSolution, rank: int | None = None, smoothing: str | None = None
) -> LayerSearch:
    return LayerSearch(rank, smoothing, {}, {}, (), (), device=solution.codes.device.type)


def _curve(
    plan: W4A4Plan, source: LinearWeights, stats: ActivationStats | None, settings: SolveSettings
) -> W4A4Solution:
    assert stats is not None  # without them no layer is planned as a curve
    assert stats.over_time is not None
    over_time = stats.over_time.to(source.weight.device).float()
    return solve_curve(plan, source.weight, source.bias, over_time, dtype=settings.dtype)


def _improve(
    shared: SharedInput,
    plans: list[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    stats: ActivationStats,
    rows: Tensor,
    settings: SolveSettings,
    start: dict[str, W4A4Solution],
) -> tuple[dict[str, W4A4Solution], StepResults]:
    layer_group = LayerGroup(
        shared.members(plans),
        weights,
        rows,
        settings.dtype,
        settings.seed,
        stats.mean,
        settings.refinements,
        stats.covariance,
    )
    x_peak, branchless = stats.abs_max.to(rows.device).float(), plans[0].branchless
    return improve(
        layer_group,
        start,
        steps=steps_for(settings, branched=any(plan.rank for plan in plans)),
        place=lambda s: snap_to_storage(
            s, x_peak, layer_group.precision, dtype=settings.dtype, inverted=branchless
        ),
        round_to_nearest=lambda s: _solve_w4a4(shared, plans, weights, s, settings),
    )


def _decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-15))


def _solve_w4a4(
    shared: SharedInput,
    plans: list[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    smooth: Tensor,
    settings: SolveSettings,
) -> dict[str, W4A4Solution]:
    """Branch, residual and codes for a given smoothing factor, in the order of `plans`."""
    if plans[0].branchless:
        return _solve_branchless(plans, weights, smooth, settings)
    solved: dict[str, W4A4Solution] = {}
    for members in _branches(shared, plans):
        up, down = split_low_rank(
            [weights[plan.name].weight for plan in members],
            rank=members[0].rank,
            seed=settings.seed,
            smooth=smooth if _smooths(smooth) else None,
        )
        down = (down / smooth).to(settings.dtype)  # the branch reads the raw activation
        for plan, rows in zip(members, up.split([p.linear.out_features for p in members]), strict=True):
            solved[plan.name] = _finish(
                plan, weights[plan.name], smooth, down, rows.to(settings.dtype), settings
            )
    return {plan.name: solved[plan.name] for plan in plans}


def _solve_branchless(
    plans: list[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    smooth: Tensor,
    settings: SolveSettings,
) -> dict[str, W4A4Solution]:
    """Codes alone, of all layers as one matrix: with one outer scale."""
    whole = stacked_weights(plans, weights).mul_(smooth)
    quantized = quantize_weight(whole, plans[0].precision, dtype=settings.dtype)
    counts = [plan.linear.out_features for plan in plans]
    solved: dict[str, W4A4Solution] = {}
    for plan, codes, scales in zip(
        plans, quantized.codes.split(counts), quantized.scales.split(counts), strict=True
    ):
        outer = None if quantized.outer is None else quantized.outer.clone()
        own = QuantizedWeight(codes.contiguous(), scales.contiguous(), outer)
        down = torch.zeros(0, plan.linear.in_features, dtype=settings.dtype, device=whole.device)
        up = torch.zeros(plan.linear.out_features, 0, dtype=settings.dtype, device=whole.device)
        solved[plan.name] = _solution(plan, weights[plan.name], smooth.to(settings.dtype), down, up, own)
    return solved


def _solve_data_free(
    shared: SharedInput,
    plans: list[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    settings: SolveSettings,
) -> dict[str, W4A4Solution]:
    """Branch and codes without a smoothing factor, fitted to each other, in the order of `plans`."""
    solved: dict[str, W4A4Solution] = {}
    for members in _branches(shared, plans):
        sources = [weights[plan.name] for plan in members]
        found = refined(
            [source.weight for source in sources],
            rank=members[0].rank,
            seed=settings.seed,
            precision=members[0].precision,
            dtype=settings.dtype,
            rounds=settings.refinements,
        )
        ups = found.up.split([plan.linear.out_features for plan in members])
        for plan, source, up, quantized in zip(members, sources, ups, found.codes, strict=True):
            smooth = torch.ones(plan.linear.in_features, dtype=settings.dtype, device=up.device)
            solved[plan.name] = _solution(plan, source, smooth, found.down, up, quantized)
    return {plan.name: solved[plan.name] for plan in plans}


def _branches(shared: SharedInput, plans: Sequence[W4A4Plan]) -> Iterator[tuple[W4A4Plan, ...]]:
    """The layers of each branch. UsageError where they have several ranks."""
    for members in shared.members(plans):
        if len({plan.rank for plan in members}) > 1:
            raise UsageError(
                f"{', '.join(plan.name for plan in members)} share one down projection and need one rank",
                hint="give them the same rank in the recipe's layers",
            )
        yield members


def _smooths(smooth: Tensor) -> bool:
    """Whether it is more than the factor of 1 of a data-free conversion."""
    return bool((smooth != 1).any())


def _finish(
    plan: W4A4Plan, source: LinearWeights, smooth: Tensor, down: Tensor, up: Tensor, settings: SolveSettings
) -> W4A4Solution:
    """Quantize what the *stored* branch leaves over, so that its rounding to 16 bits is corrected by the codes."""
    residual = Residual(source.weight, up.float(), down.float(), smooth if _smooths(smooth) else None)
    quantized = quantize_weight(residual, plan.precision, dtype=settings.dtype)
    return _solution(plan, source, smooth.to(settings.dtype), down, up, quantized)


def _solution(
    plan: W4A4Plan,
    source: LinearWeights,
    smooth: Tensor,
    down: Tensor,
    up: Tensor,
    quantized: QuantizedWeight,
) -> W4A4Solution:
    """The layer as it is stored: `smooth` (K,), `down` (R, K) and `up` (N, R) in the 16-bit dtype of its bias."""
    return W4A4Solution(
        plan=plan,
        smooth=smooth,
        down=down.contiguous(),
        up=up.contiguous(),
        codes=quantized.codes,
        scales=quantized.scales,
        outer=quantized.outer,
        bias=None if source.bias is None else source.bias.to(smooth.dtype),
    )


def measured(
    solution: LayerSolution, source: LinearWeights, rows: Tensor | None, mean: Tensor | None = None
) -> tuple[float, float]:
    """(SQNR in dB of the output on some of `rows`, or of the weight without any; the weight error that checks expect).
    `mean` (K,): what `rows` are less than the 16-bit model's, whose output is the signal."""
    error = relative_error(solution, source.weight)
    if rows is None:  # nothing was smoothed, and both are of the plain weight
        return _decibels(error**2), error
    return output_sqnr_db(evenly(rows, MEASURED_ROWS), source.weight, solution, mean), error


def _device(weights: Mapping[str, LinearWeights]) -> torch.device:
    return next(iter(weights.values())).weight.device
