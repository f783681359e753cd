"""`nunchaku-lite`: the format that diffusers (0.42 and later) loads by itself.

A checkpoint is an ordinary diffusers folder. `quantization_config` in the component's config.json lists
exact module paths; each of these modules is one linear of the same sizes (nothing is fused), and its weight
is replaced by

    W4A4   qweight (N, K/2) int8, wscales (K/G, N), smooth_factor (K,), proj_down (K, R), proj_up (N, R),
           [bias (N,)]; nvfp4 also, always both: wcscales (N,) and wtscale (1,)
    W4A16  qweight (N/4, K/2) int32, wscales and wzeros (K/64, N), [bias (N,)]

W4A4 tensors are in Nunchaku weight layout (room `pack`), vectors included. W4A16 layers keep their natural
row order and their bias as it is: diffusers splits a modulation into its parts itself. The runtime
quantizes activations as signed numbers, without a shift, so nothing is ever folded into a bias.

Source: diffusers 0.42.1, quantizers/quantization_config.py and quantizers/nunchaku/utils.py. The loader
there compares shapes, but not the set of keys, so every check that matters is made here.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats.contract import (
    SIXTEEN_BIT,
    Format,
    PackedFacts,
    TensorSpec,
    require_sound,
    require_specs,
    scale_dtype,
    specs_of,
    unsound_numbers,
)
from svdq_cli.formats.json_keys import bad_key, json_object, module_paths, optional_section, whole_number
from svdq_cli.pack.codes import pack_codes, unpack_codes
from svdq_cli.pack.low_rank import pack_down, pack_up, unpack_down, unpack_up
from svdq_cli.pack.scales import (
    pack_micro_scales,
    pack_scales,
    pack_vector,
    unpack_micro_scales,
    unpack_scales,
    unpack_vector,
)
from svdq_cli.pack.w4a16 import (
    pack_w4a16_codes,
    pack_w4a16_scales,
    unpack_w4a16_codes,
    unpack_w4a16_scales,
)
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
    W4A16Solution,
)

METHOD = "nunchaku_lite"
MAX_RANK = 1024  # the kernels take at most 64 low-rank scales, one per 16 ranks


def objection(layer: LayerPlan) -> str | None:
    """Why the kernels behind this format can't run `layer`, or None."""
    rows, columns = layer.linear.out_features, layer.linear.in_features
    if layer.linear.kind == "conv1x1":
        return "it is a 1x1 convolution, and diffusers replaces linear layers only"
    match layer:
        case W4A4Plan(rank=rank):
            if rank <= 0 or rank % 16 or rank > MAX_RANK:
                return f"rank {rank} is not a multiple of 16 from 16 to {MAX_RANK}"
            row_tile, column_tile = 128, 128
        case W4A16Plan():
            row_tile, column_tile = 8, 64
    if rows % row_tile:
        return f"out_features {rows} is not a multiple of {row_tile}"
    if columns % column_tile:
        return f"in_features {columns} is not a multiple of {column_tile}"
    return None


def tensor_specs(layer: LayerPlan, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Exactly the tensors of one layer, by suffix."""
    linear = layer.linear
    rows, columns = linear.out_features, linear.in_features
    match layer:
        case W4A4Plan(precision=precision, rank=rank):
            specs = {
                "qweight": TensorSpec((rows, columns // 2), torch.int8),
                "wscales": TensorSpec((columns // precision.group, rows), scale_dtype(layer, dtype)),
                "smooth_factor": TensorSpec((columns,), dtype),
                "proj_down": TensorSpec((columns, rank), dtype),
                "proj_up": TensorSpec((rows, rank), dtype),
            }
            if isinstance(precision, NvFp4):
                specs |= {"wcscales": TensorSpec((rows,), dtype), "wtscale": TensorSpec((1,), dtype)}
        case W4A16Plan(group=group):
            specs = {
                "qweight": TensorSpec((rows // 4, columns // 2), torch.int32),
                "wscales": TensorSpec((columns // group, rows), dtype),
                "wzeros": TensorSpec((columns // group, rows), dtype),
            }
    if linear.bias:
        specs["bias"] = TensorSpec((rows,), dtype)
    return specs


def encode(solution: LayerSolution) -> dict[str, Tensor]:
    """One solved layer as its stored tensors. ValueError where it does not fit or contradicts its plan."""
    if reason := objection(solution.plan):
        raise ValueError(f"{solution.plan.name}: {reason}")
    require_sound(solution)
    match solution:
        case W4A4Solution():
            return _encode_w4a4(solution)
        case W4A16Solution():
            return _encode_w4a16(solution)


def decode(layer: LayerPlan, tensors: Mapping[str, Tensor]) -> LayerSolution:
    """The inverse of `encode`. InputError, with the layer and the tensor, for anything but the exact tensors.

    An nvfp4 outer scale of (N,) that is one everywhere comes back as (1,): the same numbers.
    """
    require_specs(layer.name, tensor_specs(layer, _sixteen_bit_dtype(tensors)), specs_of(tensors))
    if wrong := unsound_numbers(tensors):
        raise InputError(f"{layer.name}: {'; '.join(wrong)}", where=layer.name)
    match layer:
        case W4A4Plan():
            return _decode_w4a4(layer, tensors)
        case W4A16Plan():
            return _decode_w4a16(layer, tensors)


def metadata(plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
    """The `quantization_config` object of config.json. UsageError where the format can't hold the plan."""
    _require_storable(plan, dtype)
    config: dict[str, object] = {"quant_method": METHOD, "compute_dtype": _dtype_name(dtype)}
    if plan.w4a4:
        precision = plan.w4a4[0].precision
        config["svdq_w4a4"] = {
            "precision": precision.name,
            "group_size": precision.group,
            "rank": plan.w4a4[0].rank,
            "targets": [layer.name for layer in plan.w4a4],
        }
    if plan.w4a16:
        config["awq_w4a16"] = {
            "precision": "int4",
            "group_size": W4A16Plan.group,
            "targets": [layer.name for layer in plan.w4a16],
        }
    return config


def parse_metadata(config: Mapping[str, object]) -> PackedFacts:
    """What a `quantization_config` object says. InputError that names the key where it says nothing clear."""
    if config.get("quant_method") != METHOD:
        raise bad_key("quant_method", f"is {config.get('quant_method')!r} instead of {METHOD!r}")
    dtype = _named_dtype(config.get("compute_dtype", "bfloat16"))
    w4a4, w4a16 = optional_section(config, "svdq_w4a4"), optional_section(config, "awq_w4a16")
    if w4a4 is None and w4a16 is None:
        raise bad_key("svdq_w4a4", "and awq_w4a16 are both missing")
    w4a4_names, w4a16_names, precision, rank = (), (), None, None
    if w4a4 is not None:
        w4a4_names = module_paths(w4a4, "targets", where="svdq_w4a4")
        precision, rank = _precision(w4a4), whole_number(w4a4, "rank", where="svdq_w4a4")
    if w4a16 is not None:
        w4a16_names = module_paths(w4a16, "targets", where="awq_w4a16")
        if (w4a16.get("precision"), w4a16.get("group_size")) != ("int4", W4A16Plan.group):
            raise bad_key("awq_w4a16", f"must be int4 with a group_size of {W4A16Plan.group}")
    twice = [name for name, count in Counter(w4a4_names + w4a16_names).items() if count > 1]
    if twice:
        raise bad_key("targets", f"names a layer twice: {', '.join(twice)}")
    return PackedFacts(w4a4_names, w4a16_names, precision, rank, dtype)


def layer_plans(facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
    """The plans of all quantized layers; `specs` of the checkpoint's tensors by full name."""
    plans: list[LayerPlan] = []
    for name in facts.w4a4:
        rows, half_columns = _matrix_shape(specs, name)
        linear = Linear(name, half_columns * 2, rows, f"{name}.bias" in specs)
        if facts.precision is None or facts.rank is None:
            raise ValueError(f"{name}: W4A4 layers without a precision or a rank")
        plans.append(W4A4Plan(linear, facts.precision, facts.rank))
    for name in facts.w4a16:
        quarter_rows, half_columns = _matrix_shape(specs, name)
        plans.append(W4A16Plan(Linear(name, half_columns * 2, quarter_rows * 4, f"{name}.bias" in specs)))
    return tuple(plans)


def sniff(path: Path) -> bool:
    """Whether `path` is a pipeline folder, or the folder of one component, that holds this format."""
    configs = [path / "config.json", *sorted(path.glob("*/config.json"))] if path.is_dir() else []
    return any(_names_this_method(config) for config in configs if config.is_file())


FORMAT = Format(
    name="nunchaku-lite",
    objection=objection,
    tensor_specs=tensor_specs,
    encode=encode,
    decode=decode,
    metadata=metadata,
    parse_metadata=parse_metadata,
    layer_plans=layer_plans,
    sniff=sniff,
)


# ---------------------------------------------------------------------------------------------------- tensors


def _encode_w4a4(solution: W4A4Solution) -> dict[str, Tensor]:
    precision = solution.plan.precision
    tensors = {
        "qweight": pack_codes(solution.codes, precision),
        "smooth_factor": pack_vector(solution.smooth),
        "proj_down": pack_down(solution.down),
        "proj_up": pack_up(solution.up),
    }
    match precision:
        case Int4():
            tensors["wscales"] = pack_scales(solution.scales)
        case NvFp4():
            tensors["wscales"] = pack_micro_scales(solution.scales)
            tensors |= _encode_outer(solution)
    if solution.bias is not None:
        tensors["bias"] = pack_vector(solution.bias)
    return tensors


def _encode_outer(solution: W4A4Solution) -> dict[str, Tensor]:
    """The runtime multiplies by both outer scales; the one that the solution does not use is one."""
    outer = solution.outer
    if outer is None:
        raise ValueError(f"{solution.plan.name}: nvfp4 needs an outer scale")
    if outer.numel() == 1:
        return {"wtscale": outer.clone(), "wcscales": outer.new_ones(solution.plan.linear.out_features)}
    return {"wtscale": outer.new_ones(1), "wcscales": pack_vector(outer)}


def _encode_w4a16(solution: W4A16Solution) -> dict[str, Tensor]:
    tensors = {
        "qweight": pack_w4a16_codes(solution.codes),
        "wscales": pack_w4a16_scales(solution.scales),
        "wzeros": pack_w4a16_scales(solution.zeros),
    }
    if solution.bias is not None:
        tensors["bias"] = solution.bias.clone()
    return tensors


def _decode_w4a4(layer: W4A4Plan, tensors: Mapping[str, Tensor]) -> W4A4Solution:
    match layer.precision:
        case Int4():
            scales, outer = unpack_scales(tensors["wscales"]), None
        case NvFp4():
            scales, outer = unpack_micro_scales(tensors["wscales"]), _decode_outer(layer, tensors)
    return W4A4Solution(
        plan=layer,
        smooth=unpack_vector(tensors["smooth_factor"]),
        down=unpack_down(tensors["proj_down"]),
        up=unpack_up(tensors["proj_up"]),
        codes=unpack_codes(tensors["qweight"], layer.precision),
        scales=scales,
        outer=outer,
        bias=unpack_vector(tensors["bias"]) if "bias" in tensors else None,
    )


def _decode_outer(layer: W4A4Plan, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor_scale, row_scales = tensors["wtscale"], unpack_vector(tensors["wcscales"])
    if bool((row_scales == 1).all()):
        return tensor_scale.clone()
    product = row_scales.double() * tensor_scale.double()
    outer = product.to(row_scales.dtype)
    if not torch.equal(outer.double(), product):
        raise InputError(
            f"{layer.name}: wtscale and wcscales are both in use, and {outer.dtype} can't hold their product",
            where=layer.name,
            hint="quantize the layer again with one kind of outer scale",
        )
    return outer


def _decode_w4a16(layer: W4A16Plan, tensors: Mapping[str, Tensor]) -> W4A16Solution:
    return W4A16Solution(
        plan=layer,
        codes=unpack_w4a16_codes(tensors["qweight"]),
        scales=unpack_w4a16_scales(tensors["wscales"]),
        zeros=unpack_w4a16_scales(tensors["wzeros"]),
        bias=tensors["bias"].clone() if "bias" in tensors else None,
    )


def _sixteen_bit_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The 16-bit dtype that most of a layer's tensors have, so that an error names the one that differs."""
    seen = Counter(tensor.dtype for tensor in tensors.values() if tensor.dtype in SIXTEEN_BIT)
    return seen.most_common(1)[0][0] if seen else torch.bfloat16


def _matrix_shape(specs: Mapping[str, TensorSpec], layer: str) -> tuple[int, int]:
    spec = specs.get(f"{layer}.qweight")
    if spec is None:
        raise InputError(f"{layer}: qweight is missing, though config.json names the layer", where=layer)
    if len(spec.shape) != 2:
        raise InputError(f"{layer}: qweight has the shape {spec.shape} instead of two axes", where=layer)
    return spec.shape[0], spec.shape[1]


# --------------------------------------------------------------------------------------------------- metadata


def _require_storable(plan: ModelPlan, dtype: torch.dtype) -> None:
    if dtype not in SIXTEEN_BIT:
        raise UsageError(f"nunchaku-lite stores bfloat16 or float16, not {_dtype_name(dtype)}")
    if not plan.layers:
        raise UsageError("nunchaku-lite needs at least one quantized layer, and the plan keeps all of them")
    for layer in plan.layers:
        if reason := objection(layer):
            raise UsageError(
                f"{layer.name}: nunchaku-lite can't hold it: {reason}",
                where=layer.name,
                hint="keep the layer in 16 bits",
            )
    _require_one_value("precision", plan.w4a4, lambda layer: layer.precision.name)
    _require_one_value("rank", plan.w4a4, lambda layer: layer.rank)


def _require_one_value(
    what: str, layers: Sequence[W4A4Plan], value_of: Callable[[W4A4Plan], Hashable]
) -> None:
    by_value: dict[Hashable, list[str]] = defaultdict(list)
    for layer in layers:
        by_value[value_of(layer)].append(layer.name)
    if len(by_value) < 2:
        return
    common, *others = sorted(by_value, key=lambda value: len(by_value[value]), reverse=True)
    named = "; ".join(f"{what} {value}: {_some(by_value[value])}" for value in others)
    raise UsageError(
        f"nunchaku-lite stores one {what} per file; {len(by_value[common])} layers have {what} {common}, "
        f"but {named}",
        hint=f"give all W4A4 layers the same {what}",
        where=by_value[others[0]][0],
    )


def _some(names: Sequence[str], *, shown: int = 8) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _precision(section: Mapping[str, object]) -> Precision:
    for precision in (Int4(), NvFp4()):
        if section.get("precision") == precision.name:
            if section.get("group_size") != precision.group:
                raise bad_key(
                    "svdq_w4a4.group_size", f"must be {precision.group} where precision is {precision.name}"
                )
            return precision
    raise bad_key("svdq_w4a4.precision", f"is {section.get('precision')!r} instead of 'int4' or 'nvfp4'")


def _named_dtype(name: object) -> torch.dtype:
    for dtype in SIXTEEN_BIT:
        if name == _dtype_name(dtype):
            return dtype
    raise bad_key("compute_dtype", f"is {name!r} instead of 'bfloat16' or 'float16'")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names_this_method(config: Path) -> bool:
    try:
        content = json_object(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
    section = json_object(content.get("quantization_config")) if content else None
    return section is not None and section.get("quant_method") == METHOD
