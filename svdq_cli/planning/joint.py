"""Plans of pipelines with several denoisers, whose layers have joint names (`source.denoisers`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from svdq_cli.records import LayerPlan, ModelPlan, SharedInput
from svdq_cli.source import component_of


def with_name(layer: LayerPlan, name: str) -> LayerPlan:
    """The plan for a layer named `name`."""
    return layer if layer.name == name else replace(layer, linear=replace(layer.linear, name=name))


def plan_of(plan: ModelPlan, component: str) -> ModelPlan:
    """The plan of one denoiser alone, under its own names. `parameters` stay those of all of them."""
    if plan.components == (component,):
        return plan

    def own(name: str) -> str | None:
        found, stripped = component_of(plan.components, name)
        return stripped if found == component else None

    def all_own(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(stripped for name in names if (stripped := own(name)))

    return replace(
        plan,
        components=(component,),
        layers=tuple(with_name(layer, name) for layer in plan.layers if (name := own(layer.name))),
        kept=tuple(replace(linear, name=name) for linear in plan.kept if (name := own(linear.name))),
        inputs=tuple(
            SharedInput(name, all_own(shared.layers), tuple(map(all_own, shared.branches)))
            for shared in plan.inputs
            if (name := own(shared.name))
        ),
    )
