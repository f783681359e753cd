"""Modulation layers that become curves: the recipe's `modulation: auto` and `curve`.

A layer that reads nothing but the timestep gives outputs along a curve. It is stored as a W4A4 module whose branch is
the whole layer and whose codes are zero (`solve_curve`). Where the recipe leaves it open, both ways are solved and
compared at timesteps that neither has seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from svdq_cli.calibration.over_time import modulation_inputs
from svdq_cli.conversion.memory_backoff import (
    MemoryNeed,
    Placement,
    memory_need,
    stored_itemsize,
    where_it_fits,
)
from svdq_cli.conversion.read_weights import source_weight
from svdq_cli.conversion.size_budget import as_curve, layer_bytes, with_curves
from svdq_cli.conversion.solve_layers import Statistics
from svdq_cli.conversion.work_folder import CURVES, WorkFolder
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.records import ActivationStats, Observer, SharedInput, W4A4Plan, W4A16Plan
from svdq_cli.solve.forward import output_sqnr_db
from svdq_cli.solve.modulation import solve_curve, solve_w4a16

LEAST_SQNR_DB = 30.0  # below, a curve is no curve: the timestep enters so that few directions do not hold it


def choose_curves(
    prepared: Prepared,
    statistics: Statistics | None,
    device: torch.device,
    observe: Observer,
    *,
    options: RunOptions,
    work: WorkFolder,
) -> tuple[Prepared, tuple[str, ...]]:
    """The prepared model with curves in its plan, and warnings. `curve` takes one wherever a layer depends on the
    timestep alone; `auto` where it is also no larger than W4A16 and nearer, as the first layer of its size shows.

    What was chosen is kept in the work folder.
    """
    wanted = prepared.recipe.modulation
    if wanted not in ("auto", "curve") or statistics is None:
        return prepared, ()
    chosen = work.read_json(CURVES)
    if not isinstance(chosen, list):
        chosen = list(_chosen(prepared, statistics, device, observe, options))
        work.keep_json(CURVES, chosen)
    names = {str(name) for name in chosen}
    curved = with_curves(prepared, lambda layer: layer.name in names)
    return curved, _left_over(prepared, wanted, len(chosen))


def _left_over(prepared: Prepared, wanted: str, chosen: int) -> tuple[str, ...]:
    if wanted != "curve" or chosen:
        return ()
    if not all(target.format.curves for target in prepared.targets):
        names = ", ".join(target.format.name for target in prepared.targets if not target.format.curves)
        return (f"modulation: curve has no effect: format {names} can't hold a curve",)
    return (
        "modulation: curve has no effect: no modulation layer of this model depends on the timestep alone, as far as "
        "the calibration saw (one made by an earlier svdq did not look)",
    )


def _chosen(
    prepared: Prepared,
    statistics: Statistics,
    device: torch.device,
    observe: Observer,
    options: RunOptions,
) -> Iterator[str]:
    """The names of the layers that become curves."""
    if not all(target.format.curves for target in prepared.targets):
        return
    target = prepared.targets[0]
    plans = {layer.name: layer for layer in prepared.plan.w4a16}
    every = prepared.recipe.modulation == "curve"
    nearer: dict[tuple[int, int], bool] = {}  # by size, the answer for `auto`
    for shared in modulation_inputs(prepared.plan):
        stats = statistics(shared.name)
        for name in shared.layers if stats.over_time is not None else ():
            plan, size = plans[name], (plans[name].linear.out_features, plans[name].linear.in_features)
            curve = as_curve(prepared, plan)
            if curve is None:
                continue
            if not every and size in nearer:
                taken = nearer[size]
            elif not every and layer_bytes(target, curve) > layer_bytes(target, plan):
                taken = False
            else:
                taken = _is_nearer(prepared, curve, plan, stats, device, observe, options)
            nearer[size] = taken
            if taken:
                yield name


def _is_nearer(
    prepared: Prepared,
    curve: W4A4Plan,
    plan: W4A16Plan,
    stats: ActivationStats,
    device: torch.device,
    observe: Observer,
    options: RunOptions,
) -> bool:
    """Whether the layer is a curve; and for `auto`, whether this is nearer than W4A16, at timesteps that neither was
    solved for."""
    alone = SharedInput(stats.name, (plan.name,), ((plan.name,),))
    dtype, settings = prepared.settings.dtype, prepared.settings

    def attempt(placement: Placement) -> bool:
        assert stats.over_time is not None
        source = source_weight(prepared.source, plan, placement.device)
        over_time, rows = (each.to(placement.device).float() for each in (stats.over_time, stats.rows))
        unseen = over_time[1::2]
        solved = solve_curve(curve, source.weight, source.bias, over_time[::2], dtype=dtype)
        found = min(output_sqnr_db(x, source.weight, solved) for x in (unseen, rows))
        if found < LEAST_SQNR_DB or prepared.recipe.modulation == "curve":
            return found >= LEAST_SQNR_DB
        known = rows if "gptq" in settings.steps else None
        other = solve_w4a16(plan, source.weight, source.bias, dtype=dtype, rows=known)
        return found > output_sqnr_db(unseen, source.weight, other)

    def need(placement: Placement) -> MemoryNeed:
        rows, itemsize = len(stats.rows), stored_itemsize(prepared)
        return memory_need(placement, alone, {plan.name: plan}, settings, rows=rows, itemsize=itemsize)

    return where_it_fits(
        plan.name, attempt, need, device=device, options=options, observe=observe, stage="modulation"
    )
