"""Ranks and 16-bit layers within a byte budget: `rank: auto` and `size_budget`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from svdq_cli.checkpoint.writer import Contents
from svdq_cli.conversion.memory_backoff import (
    MemoryNeed,
    Placement,
    memory_need,
    stored_itemsize,
    where_it_fits,
)
from svdq_cli.conversion.needs import is_searched
from svdq_cli.conversion.read_weights import StreamedWeights
from svdq_cli.conversion.record import Sample, record_calls
from svdq_cli.conversion.size_budget import RANKS, most_bytes, own_rank, too_small, with_plan
from svdq_cli.conversion.solve_layers import Statistics
from svdq_cli.conversion.work_folder import CHOICES, CHOSEN, WorkFolder
from svdq_cli.errors import UsageError
from svdq_cli.planning.plan import restricted
from svdq_cli.prepare.facts import predicted_sizes
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.recipe import DEFAULT_RANK
from svdq_cli.reconstruct import output_gains
from svdq_cli.records import (
    Event,
    LayerPlan,
    ModelPlan,
    Observer,
    RotatedPlan,
    SharedInput,
    W4A4Plan,
    W4A16Plan,
)
from svdq_cli.solve.allocate import Candidate, Choice, allocate, allocate_against, output_error, uniform
from svdq_cli.solve.ranks import rank_errors
from svdq_cli.solve.rotated import bit_errors
from svdq_cli.source import by_component, prefix_of

_PARTS = 2000  # of a budget: what bisection may leave of it
GAIN_SAMPLE = Sample(images=8, batches=1, calls=8)  # shows how a layer's noise reaches the output


def allocate_ranks(
    prepared: Prepared,
    statistics: Statistics | None,
    gains: Sampling | None,
    device: torch.device,
    observe: Observer,
    *,
    contents: Callable[[], Contents],
    options: RunOptions,
    work: WorkFolder,
) -> tuple[Prepared, tuple[str, ...]]:
    """The prepared model with ranks and 16-bit layers chosen by measured output error per byte, and warnings.

    A layer's error counts as much as it reaches the model's output (`output_gains`), measured on images that are
    sampled as `gains` says; where that is None all layers weigh the same. Ranks are chosen so that the layers' mean
    SQNR does not fall below that of one rank for all.

    The budget is the recipe's `size_budget`, which no output's weight files exceed (`contents`: of the outputs, without
    solutions), or, for `rank: auto` alone, the bytes of rank 32 everywhere. What was measured and chosen is kept in the
    work folder, for other processes too. UsageError where no rank for all layers fits.
    """
    if not is_searched(prepared):
        return prepared, ()
    assert statistics is not None  # `require_search` has refused it
    wanted = prepared.recipe.quantization
    ranks = RANKS if wanted.rank == "auto" else (wanted.rank,)
    candidates = _kept_candidates(work)
    if candidates is None:
        measured = layer_gains(prepared, gains, options, device, observe) if gains else None
        candidates = candidates_of(prepared, statistics, ranks, device, observe, measured, options=options)
        work.keep_json(CHOICES, [asdict(candidate) for candidate in candidates])
    if (taken := kept_allocation(prepared, work)) is not None:
        return taken
    found, chosen, warnings = _within_budget(prepared, candidates, ranks, contents)
    warnings = (*(() if gains else (_ALIKE,)), *warnings)
    places = [each.choices.index(choice) for each, choice in zip(candidates, chosen, strict=True)]
    work.keep_json(CHOSEN, {"choices": places, "warnings": list(warnings)})
    return found, warnings


def kept_allocation(prepared: Prepared, work: WorkFolder) -> tuple[Prepared, tuple[str, ...]] | None:
    """What an earlier run, or the first process, has chosen, with its warnings; None where nothing was."""
    candidates, kept = _kept_candidates(work), cast("dict[str, Any] | None", work.read_json(CHOSEN))
    if candidates is None or kept is None:
        return None
    chosen = [each.choices[place] for each, place in zip(candidates, kept["choices"], strict=True)]
    return _with_choices(prepared, candidates, chosen), tuple(kept["warnings"])


def _within_budget(
    prepared: Prepared,
    candidates: Sequence[Candidate],
    ranks: Sequence[int],
    contents: Callable[[], Contents],
) -> tuple[Prepared, Sequence[Choice], tuple[str, ...]]:
    """The best choices that are within the budget in every output, with a warning where that takes one rank for all.

    What layers take by themselves is not quite what they take in a file, which stacks, pads and lists them: where the
    file is too large, the layers are given less, as much as bisection finds that fits.
    """
    wanted, most = prepared.recipe.quantization.size_bytes, budget_of(prepared, candidates)
    best = _chosen_for(prepared, candidates, ranks, most)
    if wanted is None or most_bytes(best[0], contents()) <= wanted:
        return best
    cheapest = [min(each.choices, key=lambda choice: choice.bytes) for each in candidates]
    best = _with_choices(prepared, candidates, cheapest), cheapest, ()
    if (needed := most_bytes(best[0], contents())) > wanted:
        raise too_small(prepared, wanted, needed)
    least = sum(choice.bytes for choice in cheapest)
    while most - least > max(1, wanted // _PARTS):
        middle = (least + most) // 2
        found = _chosen_for(prepared, candidates, ranks, middle)
        if most_bytes(found[0], contents()) <= wanted:
            best, least = found, middle
        else:
            most = middle
    return best


def _chosen_for(
    prepared: Prepared, candidates: Sequence[Candidate], ranks: Sequence[int], budget: int
) -> tuple[Prepared, Sequence[Choice], tuple[str, ...]]:
    rival = None if prepared.recipe.quantization.size_bytes else DEFAULT_RANK
    chosen = choices_of(candidates, budget, rival=rival)
    try:
        return _with_choices(prepared, candidates, chosen), chosen, ()
    except UsageError as refusal:
        if len({choice.rank for choice in chosen} - {None}) < 2:
            raise
        one, choices = _best_uniform(candidates, ranks, budget)
        best, reached = (output_error(candidates, found) for found in (chosen, choices))
        warning = (
            f"rank {one} for all layers: {refusal.message}. Individual ranks would leave "
            f"{1 - best / max(reached, 1e-30):.0%} less error at the same bytes"
        )
        return _with_choices(prepared, candidates, choices), choices, (warning,)


_ALIKE = (
    "ranks and 16-bit layers are chosen as if every layer mattered equally to the images: measuring that takes the "
    "whole pipeline and prompts"
)


def layer_gains(
    prepared: Prepared, sampling: Sampling, options: RunOptions, device: torch.device, observe: Observer
) -> dict[str, float]:
    """How a W4A4 layer's noise reaches the model's output, measured on a few images."""
    found = record_calls(prepared, sampling, GAIN_SAMPLE, options=options, device=device, observe=observe)
    quantized = (*prepared.plan.w4a4, *prepared.plan.rotated)
    names = by_component(prepared.source.components, {plan.name: None for plan in quantized})
    lengths = {
        component: sum(each.length for each in trajectories) for component, (_, trajectories) in found.items()
    }
    gains: dict[str, float] = {}
    for component, (model, trajectories) in found.items():
        calls = [call for each in trajectories for call in each.calls]
        own = output_gains(model, list(names[component]), calls, seed=prepared.settings.seed)
        prefix = prefix_of(prepared.source.components, component)
        share = lengths[component] / sum(lengths.values())  # noise of more steps reaches the image more often
        gains |= {prefix + name: share * gain for name, gain in own.items()}
    return gains


def choices_of(candidates: Sequence[Candidate], budget: int, *, rival: int | None) -> list[Choice]:
    """What to take of each candidate. `rival`: the rank for all that must not be better in the layers' mean SQNR."""
    if rival is None:
        return allocate(candidates, budget)
    same = [
        next((choice for choice in candidate.choices if choice.rank == rival), candidate.choices[0])
        for candidate in candidates
    ]
    return allocate_against(candidates, budget, same)


def _kept_candidates(work: WorkFolder) -> list[Candidate] | None:
    """What an earlier run, or the first process, has measured."""
    kept = cast("list[dict[str, Any]] | None", work.read_json(CHOICES))
    return None if kept is None else [_candidate(each) for each in kept]


def _candidate(kept: dict[str, Any]) -> Candidate:
    choices = (Choice(each["rank"], each["bytes"], tuple(each["errors"])) for each in kept["choices"])
    return Candidate(tuple(kept["layers"]), tuple(choices), tuple(kept["gains"]))


def candidates_of(
    prepared: Prepared,
    statistics: Statistics,
    ranks: Sequence[int],
    device: torch.device,
    observe: Observer,
    gains: Mapping[str, float] | None,
    *,
    options: RunOptions = DEFAULT_OPTIONS,
) -> list[Candidate]:
    """The branches of the model with what each rank leaves of error, and rotated layers, those of an input together,
    with what activations of 4 and of 8 bits leave. `gains` None: all layers weigh the same."""
    layer_groups = [
        layer_group
        for layer_group in prepared.plan.layer_groups(data_free=False)
        if isinstance(prepared.plan.by_name[layer_group.layers[0]], W4A4Plan | RotatedPlan)
    ]
    found: list[Candidate] = []
    started = time.monotonic()
    observe(Event("start", "allocate", 0, len(layer_groups)))
    for done, layer_group in enumerate(layer_groups, 1):
        for names, errors in _rank_errors(
            prepared, layer_group, statistics, ranks, device, options=options, observe=observe
        ):
            choices = [
                Choice(rank, _stored_bytes(prepared, names, rank), error) for rank, error in errors.items()
            ]
            if prepared.recipe.quantization.size_bytes is not None:
                choices.append(Choice(None, _stored_bytes(prepared, names, None), (0.0,) * len(names)))
            weights_of = tuple(1.0 if gains is None else gains[name] for name in names)
            found.append(Candidate(names, tuple(choices), weights_of))
        observe(
            Event(
                "advance", "allocate", done, len(layer_groups), layer_group.name, time.monotonic() - started
            )
        )
    observe(
        Event("end", "allocate", len(layer_groups), len(layer_groups), seconds=time.monotonic() - started)
    )
    return found


def _rank_errors(
    prepared: Prepared,
    layer_group: SharedInput,
    statistics: Statistics,
    ranks: Sequence[int],
    device: torch.device,
    *,
    options: RunOptions,
    observe: Observer,
) -> list[tuple[tuple[str, ...], dict[int, tuple[float, ...]]]]:
    """`rank_errors` of a layer group of W4A4 layers, or `bit_errors` of rotated ones, in the available memory."""
    members = [plan for plan in prepared.plan.w4a4 if plan.name in layer_group.layers]
    rotated = [plan for plan in prepared.plan.rotated if plan.name in layer_group.layers]
    plans = {plan.name: plan for plan in (*members, *rotated)}

    def attempt(placement: Placement) -> list[tuple[tuple[str, ...], dict[int, tuple[float, ...]]]]:
        streamed = StreamedWeights(prepared.source, plans, layer_group.layers, placement.device)
        weights = streamed if placement.streamed else dict(streamed)
        stats = statistics(layer_group.name)
        if rotated:
            return [(tuple(plans), bit_errors(rotated, weights, stats, prepared.settings))]
        return rank_errors(
            layer_group, members, weights, stats, prepared.settings, _usable(prepared, members, ranks)
        )

    def need(placement: Placement) -> MemoryNeed:
        rows, itemsize = statistics.rows(layer_group.name), stored_itemsize(prepared)
        searched = replace(prepared.settings, steps=())
        return memory_need(placement, layer_group, plans, searched, rows=rows, itemsize=itemsize)

    return where_it_fits(
        layer_group.layers[0],
        attempt,
        need,
        device=device,
        options=options,
        observe=observe,
        stage="allocate",
    )


def _usable(prepared: Prepared, members: Sequence[W4A4Plan], ranks: Sequence[int]) -> list[int]:
    """The ranks to choose from: 0 without branches, the recipe's own word for these layers, else `ranks` up to half
    the smallest side."""
    if members[0].branchless:
        return [0]
    if any(own_rank(prepared, plan) is not None for plan in members):
        return sorted({plan.rank for plan in members})
    least = min(min(plan.linear.in_features, plan.linear.out_features) for plan in members)
    return [rank for rank in ranks if rank <= max(16, least // 32 * 16)] or [min(ranks)]


def _stored_bytes(prepared: Prepared, names: Sequence[str], rank: int | None) -> int:
    """Bytes of a branch's layers in the first output's format at `rank`, or at 16 bits."""
    target = prepared.targets[0]
    total = 0
    for name in names:
        plan = prepared.plan.by_name[name]
        if rank is None or isinstance(plan, W4A16Plan):
            total += 2 * plan.linear.out_features * (plan.linear.in_features + plan.linear.bias)
        else:
            specs = target.format.tensor_specs(_chosen(plan, rank), target.dtype)
            total += sum(spec.bytes for spec in specs.values())
    return total


def budget_of(prepared: Prepared, candidates: Sequence[Candidate]) -> int:
    """Bytes that the candidates may take together."""
    wanted = prepared.recipe.quantization.size_bytes
    planned = sum(
        _stored_bytes(prepared, candidate.layers, _planned_rank(prepared.plan, candidate))
        for candidate in candidates
    )
    if wanted is None:
        return planned
    return wanted - (predicted_sizes(prepared).output - planned)


def _planned_rank(plan: ModelPlan, candidate: Candidate) -> int:
    layer = plan.by_name[candidate.layers[0]]
    if isinstance(layer, RotatedPlan):
        return layer.activation_bits
    return layer.rank if isinstance(layer, W4A4Plan) else DEFAULT_RANK


def _best_uniform(
    candidates: Sequence[Candidate], ranks: Sequence[int], budget: int
) -> tuple[int, list[Choice]]:
    """The rank for all that leaves the least error within the budget, or the least rank where none is within it.
    UsageError where no rank is possible for all."""
    found: list[tuple[float, int, list[Choice]]] = []
    least: tuple[int, list[Choice]] | None = None
    for rank in ranks:
        same = uniform(candidates, rank, otherwise=True)
        if any(not candidate.choices for candidate in same):
            continue
        choices = allocate(same, budget)
        least = least or (rank, choices)
        if sum(choice.bytes for choice in choices) <= budget:
            found.append((output_error(same, choices), rank, choices))
    if least is None:
        raise UsageError(
            "no single rank is possible for all layers", hint="give a fixed rank", where="quantization.rank"
        )
    if not found:
        return least
    _, rank, choices = min(found, key=lambda each: each[0])
    return rank, choices


def _with_choices(prepared: Prepared, candidates: Sequence[Candidate], chosen: Sequence[Choice]) -> Prepared:
    """The plan with the choices made. UsageError where an output can't say them."""
    return with_plan(prepared, plan_with(prepared.plan, candidates, chosen))


def _chosen(layer: LayerPlan, rank: int) -> LayerPlan:
    """The layer with that rank or, where it is rotated, with activations of that many bits."""
    match layer:
        case W4A4Plan():
            return replace(layer, rank=rank)
        case RotatedPlan():
            return replace(layer, activation_bits=8 if rank == 8 else 4)
        case W4A16Plan():
            return layer


def plan_with(plan: ModelPlan, candidates: Sequence[Candidate], chosen: Sequence[Choice]) -> ModelPlan:
    """`plan` with the choices made, whatever a format can say of them."""
    ranks = {
        name: choice.rank
        for candidate, choice in zip(candidates, chosen, strict=True)
        for name in candidate.layers
    }
    layers = tuple(
        _chosen(layer, rank) if (rank := ranks.get(layer.name)) else layer for layer in plan.layers
    )
    return restricted(
        replace(plan, layers=layers), {layer.name for layer in layers if ranks.get(layer.name, 1) is not None}
    )
