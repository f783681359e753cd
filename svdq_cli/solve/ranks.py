"""What a rank buys: the output error of every branch of one shared input at several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from svdq_cli.records import ActivationStats, Precision, SharedInput, SolveSettings, W4A4Plan
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.low_rank import split_low_rank
from svdq_cli.solve.quantizers import fake_quantize_activation, fake_quantize_weight
from svdq_cli.solve.smoothing_methods import SEARCH_ROWS, Stack, choose_smoothing, evenly, stacks_of


def rank_errors(
    shared: SharedInput,
    plans: Sequence[W4A4Plan],
    weights: Mapping[str, LinearWeights],
    stats: ActivationStats,
    settings: SolveSettings,
    ranks: Sequence[int],
) -> list[tuple[tuple[str, ...], dict[int, tuple[float, ...]]]]:
    """Noise over signal of each layer at each of `ranks`, for each branch of the input.

    With the smoothing of the paper's search at the planned rank and rounding to nearest, which rank the ranks as the
    whole search does. One SVD serves all ranks.
    """
    rows = evenly(stats.rows.to(weights[plans[0].name].weight.device).float(), SEARCH_ROWS)
    smooth, _ = choose_smoothing(shared, plans, weights, stats, rows, settings)
    found: list[tuple[tuple[str, ...], dict[int, tuple[float, ...]]]] = []
    for stack in stacks_of(shared, plans, weights, rows):
        found.append((stack.layers, _errors_at(ranks, stack, smooth, rows, plans[0].precision, settings)))
        del stack  # before the next one is made
    return found


def _errors_at(
    ranks: Sequence[int],
    stack: Stack,
    smooth: Tensor,
    rows: Tensor,
    precision: Precision,
    settings: SolveSettings,
) -> dict[int, tuple[float, ...]]:
    activation = fake_quantize_activation(rows / smooth, precision)
    smoothed = stack.weight * smooth
    up, down = split_low_rank(smoothed, rank=max(ranks), seed=settings.seed)
    hidden = (rows / smooth) @ down.T
    errors: dict[int, tuple[float, ...]] = {}
    for rank in ranks:
        left = smoothed - up[:, :rank] @ down[:rank]
        rounded = fake_quantize_weight(left, precision, dtype=settings.dtype)
        errors[rank] = stack.errors(activation, rounded, hidden[:, :rank], up[:, :rank])
    return errors
