"""What a user is to know of a plan: how it was made, and which weights stay at 16 bits, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod

from svdq_cli.planning.blocks import places_of
from svdq_cli.planning.inventory import Inventory
from svdq_cli.planning.structure import STRUCTURAL
from svdq_cli.records import Linear, ModelPlan, W4A4Plan
from svdq_cli.source import is_expert

_MANY_WEIGHTS = 0.05  # of all, from which on it is said that they stay at 16 bits


def plan_warnings(plan: ModelPlan, inventory: Inventory) -> tuple[str, ...]:
    """Warnings about a plan, shared by `inspect`, `convert --plan` and `convert`."""
    structural = [_structural_warning(plan)] if plan.family == STRUCTURAL else []
    return (*structural, *kept_warnings(plan, inventory), *_experts_warning(plan))


def kept_warnings(plan: ModelPlan, inventory: Inventory) -> tuple[str, ...]:
    """Of these, what stays at 16 bits, and why."""
    return (*_kept_in_blocks(plan, inventory), *_weights_without_a_layer(plan, inventory))


def _structural_warning(plan: ModelPlan) -> str:
    return (
        f"svdq has no family file for {plan.model_class}: its layers were chosen from the module structure"
        + (
            ", without a forward pass that shows which layers share an input or are modulation"
            if plan.by_names
            else ""
        )
        + "; svdq init writes them as rules to check and edit"
    )


def _experts_warning(plan: ModelPlan) -> Iterator[str]:
    """A warning where experts that diffusers keeps in one tensor become layers, which its own loader has no place
    for."""
    experts = [layer for layer in plan.layers if is_expert(layer.name)]
    if experts:
        share = _share(plan, [layer.linear for layer in experts])
        w4a4 = sum(isinstance(layer, W4A4Plan) for layer in experts)
        yield (
            f"{share:.0%} of the weights are experts, which {plan.model_class} stacks in one tensor: they become "
            f"{len(experts)} layers ({w4a4} W4A4, {len(experts) - w4a4} W4A16), for which diffusers' own loader has no "
            "place; svdq generate and svdq_cli.load_pipeline run them. For a folder that diffusers loads, keep them at "
            "16 bits: {match: '*.experts.*', keep: true} in the recipe's layers"
        )


def _share(plan: ModelPlan, linears: Sequence[Linear]) -> float:
    return sum(linear.in_features * linear.out_features for linear in linears) / plan.parameters


def _kept_in_blocks(plan: ModelPlan, inventory: Inventory) -> Iterator[str]:
    """A warning for each reason why layers of blocks stay at 16 bits."""
    places = places_of([linear.name for linear in inventory.linears])
    by_reason: dict[str, list[Linear]] = defaultdict(list)
    for linear in plan.kept:
        if places[linear.name].stack:
            by_reason[_why_kept(linear, plan)].append(linear)
    for reason, linears in by_reason.items():
        share = _share(plan, linears)
        count = "1 block layer" if len(linears) == 1 else f"{len(linears)} block layers"
        yield (f"{count} ({share:.1%} of the weights) kept at 16 bits, such as {linears[0].name}: {reason}")


def _why_kept(linear: Linear, plan: ModelPlan) -> str:
    if linear.name in plan.kept_because:
        return plan.kept_because[linear.name]
    if linear.kind == "conv1x1":
        return "1x1 convolutions stay unless a rule of the recipe includes them"
    if plan.family != STRUCTURAL:
        return f"the {plan.family} family keeps it"
    return "it is outside the stacks of transformer blocks"


def _weights_without_a_layer(plan: ModelPlan, inventory: Inventory) -> Iterator[str]:
    """A warning where many weights are no linear layer's, such as stacked tensors of experts that svdq does not
    know."""
    weights = {f"{linear.name}.weight" for linear in inventory.linears}
    stacked = {name: prod(s) for name, s in inventory.state.items() if len(s) == 3 and name not in weights}
    share = sum(stacked.values()) / plan.parameters
    if share >= _MANY_WEIGHTS:
        largest = max(stacked, key=lambda name: stacked[name])
        yield (
            f"{share:.0%} of the weights are {len(stacked)} stacked tensors of experts or the like, which are no "
            f"linear layers, so that no output format holds them in 4 bits: they stay at 16 bits. The largest is "
            f"{largest} {list(inventory.state[largest])}"
        )
