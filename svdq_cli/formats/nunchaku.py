"""Classic Nunchaku, one file: what the engine `nunchaku` and its ComfyUI nodes load.

The header carries the model's config and the quantization config as JSON. Tensors have one of two spellings, that of
the C++ engine (`lora_down`, `smooth`) or that of the Python modules (`proj_down`, `smooth_factor`); which one, the
model's layout says. Where a module stacks layers that were quantized with an outer scale each, nvfp4 stores them by
row (`wcscales`), otherwise one for the tensor (`wtscale`). `smooth_orig` is a second copy of the smoothing factor that
no kernel reads and the Python loaders ask for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts.layout import ComfyArgument, ModelLayout
from svdq_cli.formats import tiled
from svdq_cli.formats.contract import (
    PLAIN,
    Branch,
    Format,
    PackedFacts,
    TensorSpec,
    Traits,
    require_16_bit,
    require_one_value,
    require_sound_tensors,
)
from svdq_cli.formats.headers import header_metadata
from svdq_cli.formats.json_keys import bad_key, json_object, optional_section
from svdq_cli.formats.tiled import objection
from svdq_cli.pack.scales import pack_vector, unpack_vector
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerSolution,
    Linear,
    ModelPlan,
    NvFp4,
    Precision,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
)

QUANTIZATION = "quantization_config"
METHOD = "svdquant"
DEFAULT_RANK = 32  # of files that say none
WEIGHT_DTYPES: dict[str, Precision] = {"int4": Int4(), "fp4_e2m1_all": NvFp4()}
# Python spelling -> that of the C++ engine, where they differ
ENGINE_NAMES = {
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}
_Value = TypeVar("_Value", Tensor, TensorSpec)
_PYTHON_NAMES = {engine: python for python, engine in ENGINE_NAMES.items()}


def tensor_specs(layer: LayerPlan, dtype: torch.dtype, traits: Traits = PLAIN) -> dict[str, TensorSpec]:
    """Exactly the tensors of one module, by suffix."""
    specs = tiled.tensor_specs(layer, dtype)
    if isinstance(layer, W4A4Plan):
        specs["smooth_factor_orig"] = specs["smooth_factor"]
        if isinstance(layer.precision, NvFp4):
            rows = layer.linear.out_features
            specs |= {_outer_name(traits): TensorSpec((rows if traits.row_scales else 1,), dtype)}
    return _spelled(specs, ENGINE_NAMES if traits.engine_names else {})


def encode(solution: LayerSolution, traits: Traits = PLAIN) -> dict[str, Tensor]:
    """One module as its stored tensors. ValueError where it does not fit or contradicts its plan."""
    tensors = tiled.encode(solution)
    if isinstance(solution, W4A4Solution):
        tensors["smooth_factor_orig"] = tensors["smooth_factor"].clone()
        if solution.outer is not None:
            if (solution.outer.numel() > 1) != traits.row_scales and solution.plan.linear.out_features > 1:
                raise ValueError(f"{solution.plan.name}: the outer scale has {solution.outer.numel()} values")
            outer = pack_vector(solution.outer) if traits.row_scales else solution.outer.clone()
            tensors[_outer_name(traits)] = outer
    return _spelled(tensors, ENGINE_NAMES if traits.engine_names else {})


def decode(layer: LayerPlan, tensors: Mapping[str, Tensor], traits: Traits = PLAIN) -> LayerSolution:
    """The inverse of `encode`. InputError, with the module and the tensor, for anything but the exact tensors."""
    dtype = tiled.sixteen_bit_dtype(tensors)
    require_sound_tensors(layer, tensor_specs(layer, dtype, traits), tensors)
    plain = _spelled(tensors, _PYTHON_NAMES if traits.engine_names else {})
    outer = None
    if isinstance(layer, W4A4Plan) and isinstance(layer.precision, NvFp4):
        stored = plain[_outer_name(traits)]
        outer = unpack_vector(stored) if traits.row_scales else stored.clone()
    return tiled.decode(layer, plain, outer)


def encode_branch(branch: Branch, traits: Traits = PLAIN) -> dict[str, Tensor]:
    """The branch of a module as its stored tensors."""
    return _spelled(tiled.encode_branch(branch), ENGINE_NAMES if traits.engine_names else {})


def decode_branch(tensors: Mapping[str, Tensor], traits: Traits = PLAIN) -> Branch:
    """The inverse of `encode_branch`; `tensors` may hold others of the module too."""
    names = ENGINE_NAMES if traits.engine_names else {}
    return tiled.decode_branch({name: tensors[names.get(name, name)] for name in ("proj_down", "proj_up")})


def metadata(plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
    """`quantization_config` of the header. UsageError where the format can't hold the plan."""
    require_16_bit("nunchaku", dtype)
    if not plan.w4a4:
        raise UsageError("nunchaku needs W4A4 layers, and the plan has none")
    require_one_value("nunchaku", "precision", plan.w4a4, lambda layer: layer.precision.name)
    require_one_value("nunchaku", "rank", plan.w4a4, lambda layer: layer.rank)
    precision = plan.w4a4[0].precision
    name = next(name for name, known in WEIGHT_DTYPES.items() if known == precision)
    micro = "fp8_e4m3_nan" if isinstance(precision, NvFp4) else None
    weight_scale = None if micro is None else [None, micro]
    return {
        QUANTIZATION: {
            "method": METHOD,
            "weight": {"dtype": name, "scale_dtype": weight_scale, "group_size": precision.group},
            "activation": {"dtype": name, "scale_dtype": micro, "group_size": precision.group},
            "rank": plan.w4a4[0].rank,
        }
    }


def model_metadata(layout: ModelLayout | None, config: Mapping[str, object]) -> dict[str, object]:
    """What the runtime's loaders and its ComfyUI nodes build the model from."""
    found: dict[str, object] = {"comfy_config": {}}
    if layout is not None and layout.runtime_class is not None:
        found["model_class"] = layout.runtime_class
    if layout is not None and layout.comfy_class is not None:
        arguments = {argument.name: _comfy_value(argument, config) for argument in layout.comfy_arguments}
        found["comfy_config"] = {
            "model_class": layout.comfy_class,
            "model_config": {**dict(layout.comfy_constants), **arguments},
        }
    return found


def parse_metadata(config: Mapping[str, object]) -> PackedFacts:
    """What a header says. InputError that names the key where it says nothing clear."""
    section = optional_section(config, QUANTIZATION)
    if section is None:
        raise bad_key(QUANTIZATION, "is missing")
    if section.get("method", METHOD) != METHOD:
        raise bad_key("method", f"is {section.get('method')!r} instead of {METHOD!r}")
    weight = optional_section(section, "weight")
    dtype = (weight or {}).get("dtype")
    if not isinstance(dtype, str) or dtype not in WEIGHT_DTYPES:
        raise bad_key("weight.dtype", f"is {dtype!r} instead of {' or '.join(map(repr, WEIGHT_DTYPES))}")
    rank = section.get("rank", DEFAULT_RANK)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise bad_key("rank", "must be a whole number")
    return PackedFacts((), (), WEIGHT_DTYPES[dtype], rank, None)


def layer_plans(facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
    """The stored modules, from their tensors alone; `specs` by full name."""
    plans: list[LayerPlan] = []
    for key, spec in specs.items():
        if not key.endswith(".qweight"):
            continue
        name = key.removesuffix(".qweight")
        if len(spec.shape) != 2:
            raise InputError(f"{name}: qweight has the shape {spec.shape} instead of two axes", where=name)
        rows, half = spec.shape
        bias = f"{name}.bias" in specs
        if f"{name}.wzeros" in specs:
            plans.append(W4A16Plan(Linear(name, half * 2, rows * 4, bias)))
        elif facts.precision is not None:
            plans.append(
                W4A4Plan(Linear(name, half * 2, rows, bias), facts.precision, _rank(name, specs, facts))
            )
    return tuple(plans)


def sniff(path: Path) -> bool:
    """Whether `path` is a file of this format."""
    text = header_metadata(path).get(QUANTIZATION) if path.is_file() else None
    try:
        section = json_object(json.loads(text)) if text is not None else None
    except ValueError:
        return False
    return section is not None and "quant_method" not in section and "weight" in section


FORMAT = Format(
    name="nunchaku",
    single_file=True,
    own_names=False,
    mixes=False,
    precisions=(Int4(), NvFp4()),
    unsigned_after_gelu=True,
    one_rank=True,
    objection=objection,
    tensor_specs=tensor_specs,
    encode=encode,
    decode=decode,
    encode_branch=encode_branch,
    decode_branch=decode_branch,
    metadata=metadata,
    model_metadata=model_metadata,
    parse_metadata=parse_metadata,
    layer_plans=layer_plans,
    sniff=sniff,
)


def _outer_name(traits: Traits) -> str:
    return "wcscales" if traits.row_scales else "wtscale"


def _spelled(tensors: Mapping[str, _Value], names: Mapping[str, str]) -> dict[str, _Value]:
    return {names.get(suffix, suffix): value for suffix, value in tensors.items()}


def _rank(name: str, specs: Mapping[str, TensorSpec], facts: PackedFacts) -> int:
    """The rank of one module is the width of its branch; one without a branch would have none to load."""
    for suffix in ("lora_down", "proj_down"):
        if found := specs.get(f"{name}.{suffix}"):
            return found.shape[-1]
    return facts.rank or DEFAULT_RANK


def _comfy_value(argument: ComfyArgument, config: Mapping[str, object]) -> object:
    values = [config.get(key) for key in argument.keys]
    if len(values) == 1 and argument.divisor == 1:
        return values[0]
    product = 1
    for key, value in zip(argument.keys, values, strict=True):
        if not isinstance(value, int):
            raise UsageError(
                f"config.json: {key} must be a whole number for ComfyUI's {argument.name}", where=key
            )
        product *= value
    return product // argument.divisor
