"""What ComfyUI itself loads, without custom nodes: rotated int4 layers (`convrot_w4a4`, `asym_w4a8_int8`), smoothed
`nvfp4` ones, and `awq_w4a16`.

Every quantized module carries its own metadata, JSON in a uint8 tensor `comfy_quant`, by which ComfyUI's loader chooses
the layout class of comfy-kitchen that reads it; a linear without one is an ordinary 16-bit layer. No low-rank branch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats.comfy_modules import (
    COLUMNS,
    MARKER,
    W4A16_MARKER,
    ZEROS,
    decode_w4a16,
    encode_w4a16,
    said_by_marker,
    w4a16_specs,
    w4a16_warnings,
)
from svdq_cli.formats.contract import PLAIN, Branch, Format, LayoutTraits, PackedFacts
from svdq_cli.formats.headers import FORMAT as FORMAT_KEY
from svdq_cli.formats.implied import suffixes_of
from svdq_cli.formats.soundness import require_16_bit, require_sound, require_sound_tensors, sixteen_bit_dtype
from svdq_cli.pack.kitchen import text_bytes
from svdq_cli.pack.kitchen_nvfp4 import (
    pack_block_scales,
    pack_nvfp4_codes,
    scale_shape,
    unpack_block_scales,
    unpack_nvfp4_codes,
)
from svdq_cli.pack.row_major import pack_rows, unpack_rows
from svdq_cli.pack.tiles import join_nibbles, split_nibbles
from svdq_cli.records import (
    LEVELS,
    Int4,
    LayerPlan,
    LayerSolution,
    Linear,
    ModelPlan,
    NvFp4,
    Precision,
    RotatedPlan,
    RotatedSolution,
    Scheme,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
    reciprocal,
)
from svdq_cli.storage.headers import header_metadata
from svdq_cli.storage.tensor_file import TensorSpec

NAME = "comfy-core"
W4A4, W4A8, NVFP4 = "convrot_w4a4", "asym_w4a8_int8", "nvfp4"
EXPONENT = "svdq_exponent"  # a key of nvfp4's markers; svdq's runtimes multiply inputs by 2 to its power
_EXPONENT = re.compile(r"[+-]\d\d")
PRECISION = "precision"  # a key of the header, of nvfp4 files
_ROWS = 16  # N out features of nvfp4 must be a multiple: comfy-kitchen pads a weight to it


class ComfyCore(Format):
    """A file for ComfyUI as it is."""

    name = NAME
    precisions = (Int4(), NvFp4())
    original_names = True
    one_rank = False

    def scheme_of(self, precision: Precision) -> Scheme:
        return "rotation" if isinstance(precision, Int4) else "smoothing"

    def unsupported_reason(self, layer: LayerPlan) -> str | None:
        """Why ComfyUI can't run this module in 4 bits, or None."""
        if reason := self.scheme_reason(layer):
            return reason
        if layer.linear.kind != "linear":
            return "it is a 1x1 convolution, and ComfyUI reads linear layers only"
        rows, columns = layer.linear.out_features, layer.linear.in_features
        if isinstance(layer, W4A4Plan) and rows % _ROWS:
            return f"out_features {rows} is not a multiple of {_ROWS}"
        return f"in_features {columns} is not a multiple of {COLUMNS}" if columns % COLUMNS else None

    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        rows, columns = layer.linear.out_features, layer.linear.in_features
        specs = {"weight": TensorSpec((rows, columns // 2), torch.int8)}
        match layer:
            case RotatedPlan(activation_bits=4):
                specs["weight_scale"] = TensorSpec((rows,), torch.float32)
            case RotatedPlan(group=group):
                specs["weight_s_rel"] = TensorSpec((rows, columns // group), torch.float8_e4m3fn)
                specs["weight_s_channel"] = TensorSpec((rows,), torch.float32)
                specs["weight_codebook"] = TensorSpec((len(LEVELS),), torch.float32)
            case W4A16Plan():
                specs = w4a16_specs(layer, dtype)
            case W4A4Plan():
                if reason := self.scheme_reason(layer):
                    raise ValueError(f"{layer.name}: {reason}")
                specs["weight"] = TensorSpec((rows, columns // 2), torch.uint8)
                groups = columns // layer.precision.group
                specs["weight_scale"] = TensorSpec(scale_shape(rows, groups), torch.float8_e4m3fn)
                specs["weight_scale_2"] = TensorSpec((), torch.float32)
                specs["pre_quant_scale"] = TensorSpec((columns,), dtype)
        # every marker of a plan has one length
        specs[MARKER] = TensorSpec((len(_marker(layer)),), torch.uint8)
        if layer.linear.bias:
            specs["bias"] = TensorSpec((rows,), dtype)
        return specs

    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        if reason := self.unsupported_reason(solution.plan):
            raise ValueError(f"{solution.plan.name}: {reason}")
        require_sound(solution)
        tensors: dict[str, Tensor]
        exponent = 0
        match solution:
            case RotatedSolution(row_scales=None):
                tensors = {
                    "weight": pack_rows(solution.codes, Int4()),
                    "weight_scale": solution.scales.flatten().clone(),
                }
            case RotatedSolution(row_scales=Tensor() as row_scales):
                tensors = {
                    "weight": join_nibbles(solution.codes).view(torch.int8),
                    "weight_s_rel": solution.scales.clone(),
                    "weight_s_channel": row_scales.clone(),
                    "weight_codebook": torch.tensor(LEVELS, dtype=torch.float32),
                }
            case W4A16Solution():
                tensors = encode_w4a16(solution)
            case W4A4Solution(outer=Tensor() as outer):
                exponent = _exponent(solution)
                tensors = _nvfp4_tensors(solution, outer, exponent)
            case _:  # refused above
                raise AssertionError(solution.plan.name)
        tensors[MARKER] = text_bytes(_marker(solution.plan, exponent))
        if solution.bias is not None:
            tensors["bias"] = solution.bias.clone()
        return tensors

    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        exponent = _required_exponent(layer, tensors)
        read = {suffix: tensor for suffix, tensor in tensors.items() if suffix != MARKER}
        specs = self.tensor_specs(layer, sixteen_bit_dtype(read), traits)
        require_sound_tensors(layer, {name: spec for name, spec in specs.items() if name != MARKER}, read)
        weight, bias = tensors["weight"], tensors["bias"].clone() if "bias" in tensors else None
        match layer:
            case RotatedPlan(activation_bits=4):
                scales = tensors["weight_scale"].unsqueeze(1).clone()
                return RotatedSolution(layer, unpack_rows(weight, Int4()), scales, None, bias)
            case RotatedPlan():
                if not torch.equal(tensors["weight_codebook"], torch.tensor(LEVELS, dtype=torch.float32)):
                    raise InputError(
                        f"{layer.name}: weight_codebook holds other levels than svdq's",
                        where=layer.name,
                        hint="svdq reads only comfy-core files that svdq convert wrote",
                    )
                codes = split_nibbles(weight.contiguous().view(torch.uint8)).view(torch.int8)
                scales, by_row = tensors["weight_s_rel"].clone(), tensors["weight_s_channel"].clone()
                return RotatedSolution(layer, codes, scales, by_row, bias)
            case W4A16Plan():
                return decode_w4a16(layer, tensors)
            case W4A4Plan():
                return _nvfp4_solution(layer, tensors, bias, exponent)

    def encode_branch(self, branch: Branch, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        raise ValueError(f"{NAME} has no low-rank branch")

    def decode_branch(self, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN) -> Branch:
        raise ValueError(f"{NAME} has no low-rank branch")

    def metadata(self, plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
        require_16_bit(self.name, dtype)
        if not plan.rotated and not plan.w4a4:
            raise UsageError(f"{NAME} needs W4A4 layers, and the plan has none")
        return {PRECISION: NvFp4.name} if plan.w4a4 else {}

    def warnings(self, plan: ModelPlan) -> tuple[str, ...]:
        return w4a16_warnings(plan)

    def parse_metadata(self, config: Mapping[str, object]) -> PackedFacts:
        """Of what the tensors say as well, the precision."""
        precision = NvFp4() if config.get(PRECISION) == NvFp4.name else Int4()
        return PackedFacts((), (), precision, None, None)

    def layer_plans(self, facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
        return tuple(
            _plan_of(key.removesuffix(f".{MARKER}"), specs) for key in specs if key.endswith(f".{MARKER}")
        )

    def recognizes(self, path: Path) -> bool:
        return path.is_file() and header_metadata(path).get(FORMAT_KEY) == NAME

    def implied_metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        found = suffixes_of(specs)
        quantized = {MARKER, "weight"} <= found and found & {"weight_scale", "weight_s_rel"}
        if not quantized or found & {"proj_down", "weight_proj_down"}:
            return None
        return {PRECISION: NvFp4.name} if "weight_scale_2" in found else {}


FORMAT = ComfyCore()


def _marker(plan: LayerPlan, exponent: int = 0) -> str:
    """A module's metadata: what ComfyUI's loader passes on to comfy-kitchen, and nvfp4's exponent, which it ignores."""
    match plan:
        case RotatedPlan(activation_bits=4, rotation=rotation):
            said: dict[str, object] = {"format": W4A4, "convrot_groupsize": rotation}
        case RotatedPlan(rotation=rotation, group=group):
            said = {"format": W4A8, "group_size": group, "convrot_groupsize": rotation}
        case W4A4Plan():
            said = {"format": NVFP4, EXPONENT: f"{exponent:+03d}"}
        case W4A16Plan():
            said = dict(W4A16_MARKER)
    return json.dumps(said)


def _plan_of(name: str, specs: Mapping[str, TensorSpec]) -> LayerPlan:
    """A stored module from its shapes. InputError for one that is not whole."""
    weight = specs.get(f"{name}.weight")
    if weight is None or len(weight.shape) != 2:
        raise InputError(
            f"{name}: weight of a quantized module must have two axes",
            where=name,
            hint="the file is damaged, or packed for another runtime",
        )
    linear = Linear(name, 2 * weight.shape[1], weight.shape[0], f"{name}.bias" in specs)
    if f"{name}.{ZEROS}" in specs:
        return W4A16Plan(linear)
    if f"{name}.weight_scale_2" in specs:
        return W4A4Plan(linear, NvFp4(), 0)
    return RotatedPlan.of(linear, 8 if f"{name}.weight_s_rel" in specs else 4)


def _exponent(solution: W4A4Solution) -> int:
    """The power of two that svdq's runtimes multiply inputs by, besides what smoothing moves between channels.

    It places activations in the range of e4m3 scales. ComfyUI scales activations by itself, and adds LoRAs to a weight
    as if inputs were not scaled at all: a LoRA would act 2^exponent times. So files hold factors around one.
    """
    inverse = reciprocal(solution.smooth)
    if not bool((inverse > 0).all() and torch.isfinite(inverse).all()):
        return 0
    exponent = round(float(inverse.float().log2().mean()))
    moved = inverse * 2.0**-exponent
    exact = abs(exponent) < 100 and torch.equal(moved * 2.0**exponent, inverse)
    return exponent if exact else 0


def _nvfp4_tensors(solution: W4A4Solution, outer: Tensor, exponent: int) -> dict[str, Tensor]:
    """ValueError where the module has several outer scales, or where 1 / smooth does not give smooth back."""
    if outer.numel() > 1:
        raise ValueError(f"{solution.plan.name}: {NAME} stores one outer scale for a module")
    inverse = reciprocal(solution.smooth)
    if not torch.equal(reciprocal(inverse), solution.smooth):
        raise ValueError(f"{solution.plan.name}: 1 / smooth is not exact in 16 bits")
    return {
        "weight": pack_nvfp4_codes(solution.codes),
        "weight_scale": pack_block_scales(solution.scales),
        "weight_scale_2": outer.float().reshape(()) * 2.0**exponent,
        "pre_quant_scale": inverse * 2.0**-exponent,
    }


def _nvfp4_solution(
    plan: W4A4Plan, tensors: Mapping[str, Tensor], bias: Tensor | None, exponent: int
) -> W4A4Solution:
    """The inverse of `_nvfp4_tensors`."""
    rows, columns = plan.linear.out_features, plan.linear.in_features
    inverse = tensors["pre_quant_scale"] * 2.0**exponent
    scale = tensors["weight_scale_2"] * 2.0**-exponent
    smooth, outer = reciprocal(inverse), scale.to(inverse.dtype)
    if bool((inverse == 0).any()) or not torch.equal(reciprocal(smooth), inverse):
        raise _foreign(plan, "pre_quant_scale is not 1 / smooth of a smoothing factor of 16 bits")
    if not torch.equal(outer.float(), scale):
        raise _foreign(plan, f"weight_scale_2 is not exact in {inverse.dtype}")
    try:
        scales = unpack_block_scales(tensors["weight_scale"], rows, columns // plan.precision.group)
    except ValueError as error:
        raise _foreign(plan, str(error)) from error
    return W4A4Solution(
        plan=plan,
        smooth=smooth,
        down=inverse.new_empty(0, columns),
        up=inverse.new_empty(rows, 0),
        codes=unpack_nvfp4_codes(tensors["weight"]),
        scales=scales,
        outer=outer.reshape(1),
        bias=bias,
    )


def _foreign(plan: LayerPlan, what: str) -> InputError:
    return InputError(
        f"{plan.name}: {what}",
        where=plan.name,
        hint="the file is damaged, or not from svdq: svdq reads only comfy-core files that svdq convert wrote",
    )


def _required_exponent(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> int:
    """The exponent of an nvfp4 module, 0 of others and where none is said. InputError unless the module's own metadata
    says what its tensors do."""
    found = said_by_marker(plan, tensors)
    said = dict(found)
    text = str(said.pop(EXPONENT, "+00")) if isinstance(plan, W4A4Plan) else "+00"
    wanted = {key: value for key, value in json.loads(_marker(plan)).items() if key != EXPONENT}
    if said != wanted or not _EXPONENT.fullmatch(text):
        raise InputError(
            f"{plan.name}: {MARKER} says {json.dumps(found)} instead of {_marker(plan)}",
            where=plan.name,
            hint="svdq reads only comfy-core files that svdq convert wrote",
        )
    return int(text)
