"""LoRAs on a pipeline that `load_pipeline` has loaded: `load_lora`, `set_adapters`, `unload_lora`.

    svdq_cli.load_lora(pipe, "style.safetensors", "style")
    svdq_cli.set_adapters(pipe, {"style": 0.8})

The LoRAs' ranks are put next to those of every layer's branch, as `svdq lora` does in a file. What a layer was is kept,
so that without LoRAs it is that again, bit for bit. Everything is computed before the first layer is changed: what
fails changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from svdq_cli.adapters.names import ModelShapes
from svdq_cli.adapters.read import read_adapter
from svdq_cli.adapters.updates import LowRankUpdate, WeightChange
from svdq_cli.errors import InputError, UsageError
from svdq_cli.inference.save import LORAS, MEANS
from svdq_cli.lora.factor import APPROXIMATE_RANK, factored
from svdq_cli.lora.means import vectors_of_means
from svdq_cli.lora.targets import (
    BesidePlace,
    BranchPlace,
    LayerWithBranch,
    LoadedLora,
    Place,
    TensorPlace,
    on_device,
)
from svdq_cli.lora.weights import require_same_base
from svdq_cli.records import LayerPlan, LayerSolution, W4A4Plan, W4A4Solution, W4A16Plan
from svdq_cli.runtime.linear import RunningBranch
from svdq_cli.runtime.replace import share_quantizers
from svdq_cli.solve.rebuild import rebuilt_weight

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_COMPONENTS = ("transformer", "unet")
_NAMES = "peft_config"  # attribute of a model: where diffusers' pipelines look for the names of its LoRAs


class _Converted(Protocol):
    """A converted layer of any backend."""

    @property
    def plan(self) -> LayerPlan: ...
    @property
    def solution(self) -> LayerSolution: ...


@dataclass(slots=True, eq=False)
class LoadedLoras:
    """The LoRAs of a model, their strengths, and the places where they act. Names of places: a converted layer's, or a
    tensor's."""

    model: nn.Module
    layers: Mapping[str, tuple[str, nn.Module]]  # converted, by name: its path in the model, and itself
    shapes: Mapping[str, tuple[int, ...]]  # of the 16-bit model
    loras: dict[str, LoadedLora] = field(default_factory=dict[str, LoadedLora])
    strengths: dict[str, float] = field(default_factory=dict[str, float])
    places: dict[str, Place] = field(default_factory=dict[str, Place])


def load_lora(
    pipe: DiffusionPipeline, path: str | Path, name: str, *, approximate_rank: int = APPROXIMATE_RANK
) -> None:
    """Read a LoRA file for a pipeline's model, under a name. It does nothing until `set_adapters` gives it a strength.

    DoRA, whole differences, and LoHa or LoKr of a higher rank are cut to `approximate_rank` in converted layers. Raises
    InputError for a file that does not fit the model, UsageError for a name that is taken.
    """
    state = _state_of(pipe)
    if name in state.loras:
        raise UsageError(f"a LoRA named {name!r} is loaded", hint="choose another name, or unload it first")
    model = ModelShapes(Path(type(state.model).__name__), type(state.model).__name__, state.shapes)
    adapter = require_same_base(read_adapter(Path(path), model))
    for warning in adapter.warnings:
        warnings.warn(warning, stacklevel=2)
    weights = partial(_rows_of, state)
    updates: dict[str, LowRankUpdate] = {}
    changes: dict[str, WeightChange] = {}
    for tensor, change in adapter.weights.items():
        layer = tensor.removesuffix(".weight")
        if layer in state.layers:
            updates[layer] = _factors(state, layer, change.read(weights), approximate_rank)
        else:
            changes[tensor] = change.read(weights)
    _require_vectors(state, adapter.vectors, Path(path))
    vectors = _with_means(state, adapter.vectors, updates, changes)
    for place in (*updates, *changes, *vectors):
        _add_place(state, place)
    state.loras[name] = LoadedLora(updates, changes, vectors)


def set_adapters(pipe: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
    """Give loaded LoRAs their strengths; those that are not named are off. `{}` brings back the model as it was.

    Raises UsageError for a name that is not loaded and for branches that no kernel reads; the model is then unchanged.
    """
    state = _state_of(pipe)
    for name in strengths:
        _require_loaded(state, name)
    active = [(state.loras[name], strength) for name, strength in strengths.items() if strength != 0]
    for put in [place.prepared(active) for place in state.places.values()]:
        put()
    share_quantizers(state.model)  # a layer that was given another branch reads its input alone
    state.strengths = dict(strengths)


def unload_lora(pipe: DiffusionPipeline, name: str) -> None:
    """Take a LoRA off and forget it; the others keep their strengths. UsageError for a name that is not loaded."""
    state = _state_of(pipe)
    _require_loaded(state, name)
    set_adapters(pipe, {other: value for other, value in state.strengths.items() if other != name})
    del state.loras[name]


# ------------------------------------------------------------------------------------------------- the model


def _state_of(pipe: DiffusionPipeline | nn.Module) -> LoadedLoras:
    """The LoRAs of a pipeline's converted model, or of the model itself."""
    parts = [pipe] if isinstance(pipe, nn.Module) else [getattr(pipe, name, None) for name in _COMPONENTS]
    for part in parts:
        model = getattr(part, "_orig_mod", part)  # without what torch.compile puts around it
        known = getattr(model, LORAS, None)
        if isinstance(known, LoadedLoras):
            return known
        layers = _converted_layers(model) if isinstance(model, nn.Module) else {}
        if isinstance(model, nn.Module) and layers:
            state = LoadedLoras(model, layers, _shapes_of(model, layers))
            setattr(model, LORAS, state)
            setattr(model, _NAMES, state.loras)
            return state
    raise UsageError(
        "this pipeline has no converted layers",
        hint="load a checkpoint with svdq_cli.load_pipeline; for a 16-bit pipeline use diffusers' load_lora_weights",
    )


def _converted_layers(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Converted layers by their names in the 16-bit model, which differ from their paths where a backend fuses
    modules."""
    return {
        cast("_Converted", module).plan.name: (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "plan")
    }


def _shapes_of(model: nn.Module, layers: Mapping[str, tuple[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, (_, layer) in layers.items():
        linear = cast("_Converted", layer).plan.linear
        pointwise = (1, 1) if linear.kind == "conv1x1" else ()
        shapes[f"{name}.weight"] = (linear.out_features, linear.in_features, *pointwise)
        if linear.bias:
            shapes[f"{name}.bias"] = (linear.out_features,)
    return shapes


def _factors(state: LoadedLoras, name: str, change: WeightChange, rank: int) -> LowRankUpdate:
    return factored(change, partial(_base_weight, state, name), strength=1.0, rank=rank).update


def _rows_of(state: LoadedLoras, name: str, start: int, stop: int) -> Tensor:
    """Rows of a weight as the model has it without LoRAs, in main memory."""
    if (layer := name.removesuffix(".weight")) in state.layers:
        return _base_weight(state, layer)[start:stop]
    place = state.places.get(name)
    weight = place.base if isinstance(place, TensorPlace) else state.model.get_parameter(name)
    return weight.detach()[start:stop].cpu()


def _base_weight(state: LoadedLoras, name: str) -> Tensor:
    """A converted layer's weight (N, K) without LoRAs, whichever are on now, in main memory."""
    solution, place = cast("_Converted", state.layers[name][1]).solution, state.places.get(name)
    if isinstance(solution, W4A4Solution) and isinstance(place, BranchPlace):
        down, up = (tensor.to(solution.codes.device) for tensor in (place.base.down, place.base.up))
        solution = replace(solution, down=down, up=up)
    return rebuilt_weight(solution).cpu()


def _with_means(
    state: LoadedLoras,
    vectors: Mapping[str, Tensor],
    updates: Mapping[str, LowRankUpdate],
    changes: Mapping[str, WeightChange],
) -> dict[str, Tensor]:
    """A LoRA's biases, with its part of the means that the conversion moved into the model's."""
    means = cast("Mapping[str, Tensor]", getattr(state.model, MEANS, {}))
    found = dict(vectors)
    added = vectors_of_means(updates, means)
    for name, change in changes.items():
        if (mean := means.get(layer := name.removesuffix(".weight"))) is not None:
            before = _rows_of(state, name, 0, state.shapes[name][0]).float().flatten(1)
            added[f"{layer}.bias"] = change.added_to(before) @ mean
    for name, vector in added.items():
        found[name] = found[name] + vector if name in found else vector
    return found


def _require_loaded(state: LoadedLoras, name: str) -> None:
    if name not in state.loras:
        loaded = ", ".join(state.loras) or "none"
        raise UsageError(f"no LoRA named {name!r} is loaded", hint=f"loaded: {loaded}")


def _require_vectors(state: LoadedLoras, vectors: Mapping[str, Tensor], path: Path) -> None:
    for name in vectors:
        if name not in state.shapes:
            raise InputError(
                f"{path}: it changes {name}, but the model has no bias there",
                hint="the LoRA was trained on a variant of the model",
                where=name,
                kind="lora-mismatch",
            )


# ------------------------------------------------------------------------------------------------- places


def _add_place(state: LoadedLoras, name: str) -> None:
    """The place of a converted layer or of a tensor, with what is there now; nothing where it is known."""
    layer = name.removesuffix(".bias")
    if layer in state.layers:
        if layer not in state.places:
            state.places[layer] = _layer_place(state, layer)
    elif name not in state.places:
        path, _, leaf = name.rpartition(".")
        parent = state.model.get_submodule(path)
        state.places[name] = TensorPlace(name, parent, leaf, cast("nn.Parameter", getattr(parent, leaf)))


def _layer_place(state: LoadedLoras, name: str) -> Place:
    path, layer = state.layers[name]
    plan = cast("_Converted", layer).plan
    if isinstance(plan, W4A4Plan):
        running = cast("LayerWithBranch", layer)
        return BranchPlace(name, running, on_device(running.branch, torch.device("cpu")))
    above, _, leaf = path.rpartition(".")
    scales = cast("Tensor", layer.scales)
    dtype = scales.dtype if isinstance(plan, W4A16Plan) else torch.bfloat16
    empty = RunningBranch(
        torch.empty(0, plan.linear.in_features, dtype=dtype),
        torch.empty(plan.linear.out_features, 0, dtype=dtype),
        None,
    )
    return BesidePlace(name, state.model.get_submodule(above), leaf, layer, empty)
