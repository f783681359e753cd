"""LoRAs on a pipeline that `load_pipeline` has loaded: `load_lora`, `set_adapters`, `unload_lora`.

    svdq_cli.load_lora(pipe, "style.safetensors", "style")
    svdq_cli.set_adapters(pipe, {"style": 0.8})

The LoRAs' ranks are put next to those of every layer's branch, as `svdq lora` does in a file. What a layer was is kept,
so that without LoRAs it is that again, bit for bit. Everything is computed before the first layer is changed: what
fails changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from svdq_cli.adapters.changes import StoredChange, WeightRows
from svdq_cli.adapters.denoiser import LoraFile, read_lora
from svdq_cli.adapters.names import ModelShapes
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
from svdq_cli.source import by_component, component_of, denoiser_order, is_denoiser, prefix_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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
    pipe: DiffusionPipeline,
    path: str | Path,
    name: str,
    *,
    component: str | None = None,
    approximate_rank: int = APPROXIMATE_RANK,
) -> None:
    """Read a LoRA file for a pipeline's model, under a name. It does nothing until `set_adapters` gives it a strength.

    `component`: which of several denoisers it is for (Wan 2.2: "transformer" or "transformer_2"), where neither the
    names in the file nor its own name tell. Two LoRAs for two denoisers may have one name, and so one strength.

    DoRA, whole differences, and LoHa or LoKr of a higher rank are cut to `approximate_rank` in converted layers. Raises
    InputError for a file that does not fit the model, UsageError for a name that is taken and where nothing tells the
    denoiser.
    """
    states = _states_of(pipe)
    adapter = require_same_base(read_lora(LoraFile(Path(path), component=component), _model_of(states)))
    touched = {component_of([*states], tensor)[0] for tensor in (*adapter.weights, *adapter.vectors)}
    if any(name in states[each].loras for each in touched):
        raise UsageError(f"a LoRA named {name!r} is loaded", hint="choose another name, or unload it first")
    for warning in adapter.warnings:
        warnings.warn(warning, stacklevel=2)
    _require_vectors(states, adapter.vectors, Path(path))
    weights = by_component([*states], adapter.weights)
    vectors = by_component([*states], adapter.vectors)
    rows = partial(_rows_of, states)
    loaded = {
        each: _loaded(states[each], weights[each], vectors[each], rows, approximate_rank) for each in touched
    }
    for each, lora in loaded.items():
        for place in (*lora.updates, *lora.changes, *lora.vectors):
            _add_place(states[each], place)
        states[each].loras[name] = lora


def _loaded(
    state: LoadedLoras,
    weights: Mapping[str, StoredChange],
    vectors: Mapping[str, Tensor],
    rows: WeightRows,
    rank: int,
) -> LoadedLora:
    """What a file does to one denoiser. `weights`, `vectors`: by tensor; `rows`: of the pipeline's weights."""
    updates: dict[str, LowRankUpdate] = {}
    changes: dict[str, WeightChange] = {}
    for tensor, change in weights.items():
        layer = tensor.removesuffix(".weight")
        if layer in state.layers:
            updates[layer] = _factors(state, layer, change.read(rows), rank)
        else:
            changes[tensor] = change.read(rows)
    return LoadedLora(updates, changes, _with_means(state, vectors, updates, changes))


def set_adapters(pipe: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
    """Give loaded LoRAs their strengths; those that are not named are off. `{}` brings back the model as it was.

    Raises UsageError for a name that is not loaded and for branches that no kernel reads; the model is then unchanged.
    """
    states = _states_of(pipe)
    for name in strengths:
        _require_loaded(states, name)
    prepared = [put for state in states.values() for put in _prepared(state, strengths)]
    for put in prepared:
        put()
    for state in states.values():
        share_quantizers(state.model)  # a layer that was given another branch reads its input alone
        state.strengths = {name: value for name, value in strengths.items() if name in state.loras}


def _prepared(state: LoadedLoras, strengths: Mapping[str, float]) -> list[Callable[[], None]]:
    """What puts those of the LoRAs into a denoiser that it has."""
    active = [(state.loras[n], value) for n, value in strengths.items() if value != 0 and n in state.loras]
    return [place.prepared(active) for place in state.places.values()]


def unload_lora(pipe: DiffusionPipeline, name: str) -> None:
    """Take a LoRA off and forget it; the others keep their strengths. UsageError for a name that is not loaded."""
    states = _states_of(pipe)
    _require_loaded(states, name)
    for state in states.values():
        if name in state.loras:
            others = {other: value for other, value in state.strengths.items() if other != name}
            set_adapters(cast("DiffusionPipeline", state.model), others)
            del state.loras[name]


# ------------------------------------------------------------------------------------------------- the model


def _states_of(pipe: DiffusionPipeline | nn.Module) -> dict[str, LoadedLoras]:
    """The LoRAs of a pipeline's converted denoisers, by component, or of a model itself."""
    if isinstance(pipe, nn.Module):
        parts = {"transformer": pipe}
    else:
        # of anything else that carries a model, its attributes
        components = getattr(pipe, "components", None) or vars(pipe)
        parts = {
            name: components[name] for name in sorted(filter(is_denoiser, components), key=denoiser_order)
        }
    if states := {name: state for name, part in parts.items() if (state := _state_of(part)) is not None}:
        return states
    raise UsageError(
        "this pipeline has no converted layers",
        hint="load a checkpoint with svdq_cli.load_pipeline; for a 16-bit pipeline use diffusers' load_lora_weights",
    )


def _state_of(part: object) -> LoadedLoras | None:
    """The LoRAs of a model; None where it has no converted layers."""
    model = getattr(part, "_orig_mod", part)  # without what torch.compile puts around it
    known = getattr(model, LORAS, None)
    if isinstance(known, LoadedLoras):
        return known
    layers = _converted_layers(model) if isinstance(model, nn.Module) else {}
    if not isinstance(model, nn.Module) or not layers:
        return None
    state = LoadedLoras(model, layers, _shapes_of(model, layers))
    setattr(model, LORAS, state)
    setattr(model, _NAMES, state.loras)
    return state


def _model_of(states: Mapping[str, LoadedLoras]) -> ModelShapes:
    """What an adapter must fit: all denoisers, under joint names (`source.denoisers`)."""
    first, *others = states
    class_name = type(states[first].model).__name__
    shapes = {
        prefix_of([*states], component) + name: shape
        for component, state in states.items()
        for name, shape in state.shapes.items()
    }
    return ModelShapes(Path(class_name), class_name, shapes, first, tuple(others))


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


def _rows_of(states: Mapping[str, LoadedLoras], joint_name: str, start: int, stop: int) -> Tensor:
    """Rows of a weight as its denoiser has it without LoRAs, in main memory."""
    component, name = component_of([*states], joint_name)
    return _rows_in(states[component], name, start, stop)


def _rows_in(state: LoadedLoras, name: str, start: int, stop: int) -> Tensor:
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
            before = _rows_in(state, name, 0, state.shapes[name][0]).float().flatten(1)
            added[f"{layer}.bias"] = change.added_to(before) @ mean
    for name, vector in added.items():
        found[name] = found[name] + vector if name in found else vector
    return found


def _require_loaded(states: Mapping[str, LoadedLoras], name: str) -> None:
    known = dict.fromkeys(each for state in states.values() for each in state.loras)
    if name not in known:
        loaded = ", ".join(known) or "none"
        raise UsageError(f"no LoRA named {name!r} is loaded", hint=f"loaded: {loaded}")


def _require_vectors(states: Mapping[str, LoadedLoras], vectors: Mapping[str, Tensor], path: Path) -> None:
    shapes = _model_of(states).shapes
    for name in vectors:
        if name not in shapes:
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
