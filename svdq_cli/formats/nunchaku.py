"""Classic Nunchaku, one file: what the engine `nunchaku` and its ComfyUI nodes load.

The header carries the model's config and the quantization config as JSON. Tensors have one of two spellings, that of
the C++ engine (`lora_down`, `smooth`) or that of the Python modules (`proj_down`, `smooth_factor`); which one, the
model's layout says. Where a module stacks layers that were quantized with an outer scale each, nvfp4 stores them by
row (`wcscales`), otherwise one for the tensor (`wtscale`). `smooth_orig` is a second copy of the smoothing factor that
no kernel reads and the Python loaders ask for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.families.layouts.layout import ComfyArgument, ModelLayout
from svdq_cli.formats import tiled
from svdq_cli.formats.contract import PLAIN, Branch, Format, LayoutTraits, PackedFacts
from svdq_cli.formats.implied import suffixes_of, widest_branch
from svdq_cli.formats.json_keys import bad_key, json_object, optional_section
from svdq_cli.formats.soundness import (
    require_16_bit,
    require_one_value,
    require_sound_tensors,
    sixteen_bit_dtype,
)
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
from svdq_cli.storage.headers import header_metadata
from svdq_cli.storage.tensor_file import TensorSpec

QUANTIZATION = "quantization_config"
METHOD = "svdquant"
UNSAID_RANK = 32  # of files that say none
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


def sglang_name(name: str, precision: str, rank: int) -> str:
    """The name under which SGLang takes the file `name` for a 4-bit one, and reads both from it: `name` itself where it
    says them already."""
    said = f"svdq-{'fp4' if precision == NvFp4.name else precision}_r{rank}"
    return name if re.search(rf"{said}(?!\d)", name) else f"{said}-{name}"


class Nunchaku(Format):
    """Nunchaku's own file."""

    name = "nunchaku"
    precisions = (Int4(), NvFp4())
    mixes = False
    unsigned_after_gelu = True

    def naming(self, name: str, family: str, precision: str, rank: int) -> str | None:
        said = sglang_name(name, precision, rank)
        if said == name or not any(layout.sglang for layout in LAYOUTS if layout.family == family):
            return None
        return f"in SGLang: name the file {said}, by which it knows precision and rank"

    def unsupported_reason(self, layer: LayerPlan) -> str | None:
        return tiled.unsupported_reason(layer)

    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        specs = tiled.tensor_specs(layer, dtype)
        if isinstance(layer, W4A4Plan):
            specs["smooth_factor_orig"] = specs["smooth_factor"]
            if isinstance(layer.precision, NvFp4):
                rows = layer.linear.out_features
                specs |= {_outer_name(traits): TensorSpec((rows if traits.row_scales else 1,), dtype)}
        return _spelled(specs, ENGINE_NAMES if traits.engine_names else {})

    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        tensors = tiled.encode(solution)
        if isinstance(solution, W4A4Solution):
            tensors["smooth_factor_orig"] = tensors["smooth_factor"].clone()
            if solution.outer is not None:
                if (
                    solution.outer.numel() > 1
                ) != traits.row_scales and solution.plan.linear.out_features > 1:
                    raise ValueError(
                        f"{solution.plan.name}: the outer scale has {solution.outer.numel()} values"
                    )
                outer = pack_vector(solution.outer) if traits.row_scales else solution.outer.clone()
                tensors[_outer_name(traits)] = outer
        return _spelled(tensors, ENGINE_NAMES if traits.engine_names else {})

    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        dtype = sixteen_bit_dtype(tensors)
        require_sound_tensors(layer, self.tensor_specs(layer, dtype, traits), tensors)
        plain = _spelled(tensors, _PYTHON_NAMES if traits.engine_names else {})
        outer = None
        if isinstance(layer, W4A4Plan) and isinstance(layer.precision, NvFp4):
            stored = plain[_outer_name(traits)]
            outer = unpack_vector(stored) if traits.row_scales else stored.clone()
        return tiled.decode(layer, plain, outer)

    def encode_branch(self, branch: Branch, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        return _spelled(tiled.encode_branch(branch), ENGINE_NAMES if traits.engine_names else {})

    def decode_branch(self, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN) -> Branch:
        names = ENGINE_NAMES if traits.engine_names else {}
        return tiled.decode_branch(
            {name: tensors[names.get(name, name)] for name in ("proj_down", "proj_up")}
        )

    def metadata(self, plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
        require_16_bit(self.name, dtype)
        if not plan.w4a4:
            raise UsageError("nunchaku needs W4A4 layers, and the plan has none")
        require_one_value(self.name, "precision", plan.w4a4, lambda layer: layer.precision.name)
        require_one_value(self.name, "rank", plan.w4a4, lambda layer: layer.rank)
        precision = plan.w4a4[0].precision
        name = _weight_dtype(precision)
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

    def model_metadata(self, layout: ModelLayout | None, config: Mapping[str, object]) -> dict[str, object]:
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

    def parse_metadata(self, config: Mapping[str, object]) -> PackedFacts:
        section = optional_section(config, QUANTIZATION)
        if section is None:
            raise bad_key(QUANTIZATION, "is missing")
        if section.get("method", METHOD) != METHOD:
            raise bad_key("method", f"is {section.get('method')!r} instead of {METHOD!r}")
        weight = optional_section(section, "weight")
        dtype = (weight or {}).get("dtype")
        if not isinstance(dtype, str) or dtype not in WEIGHT_DTYPES:
            raise bad_key("weight.dtype", f"is {dtype!r} instead of {' or '.join(map(repr, WEIGHT_DTYPES))}")
        rank = section.get("rank", UNSAID_RANK)
        if not isinstance(rank, int) or isinstance(rank, bool):
            raise bad_key("rank", "must be a whole number")
        return PackedFacts((), (), WEIGHT_DTYPES[dtype], rank, None)

    def layer_plans(self, facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
        plans: list[LayerPlan] = []
        for key, spec in specs.items():
            if not key.endswith(".qweight"):
                continue
            name = key.removesuffix(".qweight")
            if len(spec.shape) != 2:
                raise InputError(
                    f"{name}: qweight has the shape {spec.shape} instead of two axes", where=name
                )
            rows, half = spec.shape
            bias = f"{name}.bias" in specs
            if f"{name}.wzeros" in specs:
                plans.append(W4A16Plan(Linear(name, half * 2, rows * 4, bias)))
            elif facts.precision is not None:
                plans.append(
                    W4A4Plan(Linear(name, half * 2, rows, bias), facts.precision, _rank(name, specs, facts))
                )
        return tuple(plans)

    def recognizes(self, path: Path) -> bool:
        text = header_metadata(path).get(QUANTIZATION) if path.is_file() else None
        try:
            section = json_object(json.loads(text)) if text is not None else None
        except ValueError:
            return False
        return section is not None and "quant_method" not in section and "weight" in section

    def implied_metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        suffixes = suffixes_of(specs)
        if not {"qweight", "wscales"} <= suffixes or not suffixes & {"smooth_factor_orig", "smooth_orig"}:
            return None
        # Modulation layers (W4A16) have 16-bit scales in either precision
        eight = any(
            spec.dtype == torch.float8_e4m3fn for name, spec in specs.items() if name.endswith(".wscales")
        )
        dtype = _weight_dtype(NvFp4() if eight else Int4())
        return {QUANTIZATION: {"method": METHOD, "weight": {"dtype": dtype}, "rank": widest_branch(specs)}}


FORMAT = Nunchaku()


def _weight_dtype(precision: Precision) -> str:
    return next(name for name, known in WEIGHT_DTYPES.items() if known == precision)


def _outer_name(traits: LayoutTraits) -> str:
    return "wcscales" if traits.row_scales else "wtscale"


def _spelled(tensors: Mapping[str, _Value], names: Mapping[str, str]) -> dict[str, _Value]:
    return {names.get(suffix, suffix): value for suffix, value in tensors.items()}


def _rank(name: str, specs: Mapping[str, TensorSpec], facts: PackedFacts) -> int:
    """The rank of one module is the width of its branch; one without a branch would have none to load."""
    for suffix in ("lora_down", "proj_down"):
        if found := specs.get(f"{name}.{suffix}"):
            return found.shape[-1]
    return facts.rank or UNSAID_RANK


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
