"""`size_budget`: what every output takes on the disk, before any number exists, and what is least possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase

from svdq_cli.checkpoint.writer import Contents, Target, target_of, weight_bytes
from svdq_cli.conversion.needs import Needs, is_searched
from svdq_cli.errors import UsageError
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.recipe import DEFAULT_RANK, RankOverride
from svdq_cli.records import LayerPlan, ModelPlan, W4A4Plan, W4A16Plan
from svdq_cli.reports import SizeBudgetFacts

RANKS = tuple(range(16, 129, 16))  # of which `rank: auto` chooses


def with_plan(prepared: Prepared, plan: ModelPlan) -> Prepared:
    """The prepared model with another plan. UsageError where an output can't say it."""
    state, dtype = prepared.inventory.state, prepared.settings.dtype
    targets = tuple(target_of(target.format, plan, state, dtype) for target in prepared.targets)
    return replace(prepared, plan=plan, targets=targets)


def own_rank(prepared: Prepared, layer: W4A4Plan) -> int | None:
    """The rank that a rule of the recipe gives the layer; None where it is searched."""
    rules = [rule for rule in prepared.recipe.layers if isinstance(rule, RankOverride)]
    return layer.rank if any(fnmatchcase(layer.name, rule.match) for rule in rules) else None


def as_curve(prepared: Prepared, plan: LayerPlan) -> W4A4Plan | None:
    """A modulation as a curve; None where an output can't hold it."""
    quantization = prepared.recipe.quantization
    ranks = {layer.rank for layer in prepared.plan.w4a4}
    rank = max(ranks) if ranks else DEFAULT_RANK if quantization.rank == "auto" else quantization.rank
    curve = W4A4Plan(plan.linear, quantization.number_format, rank, curve=True)
    fits = all(target.format.unsupported_reason(curve) is None for target in prepared.targets)
    return curve if fits else None


def with_curves(prepared: Prepared, wanted: Callable[[LayerPlan], bool]) -> Prepared:
    """The prepared model with the layers that are wanted as curves, where the outputs can hold them."""
    layers = tuple(
        as_curve(prepared, layer) or layer if wanted(layer) else layer for layer in prepared.plan.layers
    )
    return (
        prepared
        if layers == prepared.plan.layers
        else with_plan(prepared, replace(prepared.plan, layers=layers))
    )


def layer_bytes(target: Target, layer: LayerPlan) -> int:
    """Bytes of one layer's tensors in an output where it is a module of its own."""
    return sum(spec.bytes for spec in target.format.tensor_specs(layer, target.dtype).values())


def most_bytes(prepared: Prepared, contents: Contents) -> int:
    """The weight files of the largest output, headers included, whatever modulations turn out to be curves."""
    most = max(weight_bytes(target, contents) for target in prepared.targets)
    if prepared.recipe.modulation not in ("auto", "curve"):
        return most
    if not all(target.format.curves for target in prepared.targets):
        return most
    curved = with_curves(prepared, lambda layer: _may_be_curve(prepared, layer))
    return max(most, *(weight_bytes(target, contents) for target in curved.targets))


def _may_be_curve(prepared: Prepared, layer: LayerPlan) -> bool:
    """As far as bytes say: `auto` takes no curve that is larger."""
    curve = as_curve(prepared, layer) if isinstance(layer, W4A16Plan) else None
    if curve is None or prepared.recipe.modulation == "curve":
        return curve is not None
    return layer_bytes(prepared.targets[0], curve) <= layer_bytes(prepared.targets[0], layer)


def at_least(prepared: Prepared) -> Prepared:
    """The prepared model with everything that is searched as small as it gets."""
    if prepared.recipe.quantization.rank != "auto":
        return prepared

    def least(layer: LayerPlan) -> LayerPlan:
        searched = isinstance(layer, W4A4Plan) and not layer.branchless and own_rank(prepared, layer) is None
        return replace(layer, rank=RANKS[0]) if searched else layer

    return with_plan(prepared, replace(prepared.plan, layers=tuple(map(least, prepared.plan.layers))))


def require_search(
    prepared: Prepared, needs: Needs, contents: Callable[[], Contents]
) -> SizeBudgetFacts | None:
    """What a `size_budget` leaves, None without one. UsageError for a budget that can't be met or that an output's
    format has no use for, and for ranks or a budget without calibration."""
    if not is_searched(prepared):
        return None
    if needs.data_free:
        raise UsageError(
            "rank auto and size_budget measure layers on calibration rows, but there is no calibration",
            hint="name prompts with --prompts or a recipe, give --calib, or give a fixed rank",
            where="quantization.rank",
        )
    wanted = prepared.recipe.quantization.size_bytes
    if wanted is None:
        return None
    _require_mixing(prepared)
    least = most_bytes(at_least(prepared), contents())
    if wanted < least:
        raise too_small(prepared, wanted, least)
    return SizeBudgetFacts(wanted, least, wanted - least)


def too_small(prepared: Prepared, wanted: int, least: int) -> UsageError:
    """The error for a budget of `wanted` bytes where `least` are needed."""
    ranked = prepared.recipe.quantization.rank != "auto" and any(plan.rank for plan in prepared.plan.w4a4)
    return UsageError(
        f"size_budget of {wanted:,} bytes is too small: the smallest possible for this model is {least:,} bytes",
        hint="raise size_budget, or lower the rank" if ranked else "raise size_budget",
        where="quantization.size_budget",
    )


def _require_mixing(prepared: Prepared) -> None:
    for target in prepared.targets:
        if not target.format.mixes:
            raise UsageError(
                f"size_budget leaves layers at 16 bits, but format {target.format.name!r} can't store them",
                hint="drop size_budget, or choose another format",
                where="quantization.size_budget",
            )
