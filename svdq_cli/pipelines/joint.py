"""The denoisers of a loaded pipeline, whose layers are found by the joint names that `source.denoisers` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from svdq_cli.source import component_of, is_denoiser

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class JointModel(nn.Module):
    """Several denoisers of one pipeline. It finds their layers and is not called itself."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def get_submodule(self, target: str) -> nn.Module:
        component, own = component_of(tuple(self.models), target)
        return self.models[component].get_submodule(own)


def joint_model(pipe: DiffusionPipeline, components: Sequence[str]) -> nn.Module:
    """The pipeline's denoiser, or those of `components` together."""
    models = {component: getattr(pipe, component) for component in components}
    return models[components[0]] if len(components) == 1 else JointModel(models)


def denoisers_in(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """All denoisers that the pipeline has, converted together or not, by component."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if is_denoiser(name) and isinstance(part, nn.Module)}
