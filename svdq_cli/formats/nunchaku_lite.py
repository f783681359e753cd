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
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats import tiled
from svdq_cli.formats.contract import PLAIN, Branch, Format, LayoutTraits, PackedFacts
from svdq_cli.formats.json_keys import bad_key, json_object, module_paths, optional_section, whole_number
from svdq_cli.formats.soundness import (
    SIXTEEN_BIT,
    dtype_name,
    outer_of_both,
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
from svdq_cli.storage.tensor_file import TensorSpec

METHOD = "nunchaku_lite"


class NunchakuLite(Format):
    """A diffusers folder."""

    name = "nunchaku-lite"
    precisions = (Int4(), NvFp4())
    single_file = False
    own_names = True
    curves = True

    def unsupported_reason(self, layer: LayerPlan) -> str | None:
        """Why diffusers or the kernels behind this format can't run `layer`, or None."""
        if layer.linear.kind == "conv1x1":
            return "it is a 1x1 convolution, and diffusers replaces linear layers only"
        return tiled.unsupported_reason(layer)

    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        specs = tiled.tensor_specs(layer, dtype)
        if isinstance(layer, W4A4Plan) and isinstance(layer.precision, NvFp4):
            rows = layer.linear.out_features
            specs |= {"wcscales": TensorSpec((rows,), dtype), "wtscale": TensorSpec((1,), dtype)}
        return specs

    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        tensors = tiled.encode(solution)
        if isinstance(solution, W4A4Solution) and solution.outer is not None:
            tensors |= _encode_outer(solution, solution.outer)
        return tensors

    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        """The inverse of `encode`. InputError, with the layer and the tensor, for anything but the exact tensors.

        An nvfp4 outer scale of (N,) that is one everywhere comes back as (1,): the same numbers.
        """
        require_sound_tensors(layer, self.tensor_specs(layer, sixteen_bit_dtype(tensors)), tensors)
        outer = None
        if isinstance(layer, W4A4Plan) and isinstance(layer.precision, NvFp4):
            outer = _decode_outer(layer, tensors)
        return tiled.decode(layer, tensors, outer)

    def encode_branch(self, branch: Branch, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        return tiled.encode_branch(branch)

    def decode_branch(self, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN) -> Branch:
        return tiled.decode_branch(tensors)

    def metadata(self, plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
        """The `quantization_config` object of config.json. UsageError where the format can't hold the plan."""
        self._require_storable(plan, dtype)
        config: dict[str, object] = {"quant_method": METHOD, "compute_dtype": dtype_name(dtype)}
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

    def parse_metadata(self, config: Mapping[str, object]) -> PackedFacts:
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

    def layer_plans(self, facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
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

    def recognizes(self, path: Path) -> bool:
        """Whether `path` is a pipeline folder, or the folder of one component, that holds this format."""
        configs = [path / "config.json", *sorted(path.glob("*/config.json"))] if path.is_dir() else []
        return any(_names_this_method(config) for config in configs if config.is_file())

    def _require_storable(self, plan: ModelPlan, dtype: torch.dtype) -> None:
        require_16_bit(self.name, dtype)
        if not plan.layers:
            raise UsageError(
                "nunchaku-lite needs at least one quantized layer, and the plan keeps all of them"
            )
        for layer in plan.layers:
            if reason := self.unsupported_reason(layer):
                raise UsageError(
                    f"{layer.name}: nunchaku-lite can't hold it: {reason}",
                    where=layer.name,
                    hint="keep the layer in 16 bits",
                )
        require_one_value(self.name, "precision", plan.w4a4, lambda layer: layer.precision.name)
        require_one_value(self.name, "rank", plan.w4a4, lambda layer: layer.rank)


FORMAT = NunchakuLite()


# ---------------------------------------------------------------------------------------------------- tensors


def _encode_outer(solution: W4A4Solution, outer: Tensor) -> dict[str, Tensor]:
    """The runtime multiplies by both outer scales; the one that the solution does not use is one."""
    if outer.numel() == 1:
        return {"wtscale": outer.clone(), "wcscales": outer.new_ones(solution.plan.linear.out_features)}
    return {"wtscale": outer.new_ones(1), "wcscales": pack_vector(outer)}


def _decode_outer(layer: W4A4Plan, tensors: Mapping[str, Tensor]) -> Tensor:
    return outer_of_both(layer.name, tensors["wtscale"], unpack_vector(tensors["wcscales"]))


def _matrix_shape(specs: Mapping[str, TensorSpec], layer: str) -> tuple[int, int]:
    spec = specs.get(f"{layer}.qweight")
    if spec is None:
        raise InputError(f"{layer}: qweight is missing, though config.json names the layer", where=layer)
    if len(spec.shape) != 2:
        raise InputError(f"{layer}: qweight has the shape {spec.shape} instead of two axes", where=layer)
    return spec.shape[0], spec.shape[1]


# --------------------------------------------------------------------------------------------------- metadata


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
        if name == dtype_name(dtype):
            return dtype
    raise bad_key("compute_dtype", f"is {name!r} instead of 'bfloat16' or 'float16'")


def _names_this_method(config: Path) -> bool:
    try:
        content = json_object(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
    section = json_object(content.get("quantization_config")) if content else None
    return section is not None and section.get("quant_method") == METHOD
