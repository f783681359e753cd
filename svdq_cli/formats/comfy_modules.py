"""What both formats for ComfyUI share: every quantized module says in its own metadata, JSON in a uint8 tensor, which
of comfy-kitchen's layouts reads it; and one of these layouts, `awq_w4a16`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.formats.json_keys import json_object
from svdq_cli.pack.kitchen import bytes_text
from svdq_cli.pack.kitchen_awq import pack_awq, unpack_awq
from svdq_cli.records import LayerPlan, ModelPlan, W4A16Plan, W4A16Solution
from svdq_cli.storage.tensor_file import TensorSpec

MARKER = "comfy_quant"
W4A16 = "awq_w4a16"
COLUMNS = (
    64  # K in features must be a multiple: of the packed bytes that comfy-kitchen's kernels take at once
)
W4A16_MARKER: Mapping[str, object] = {"format": W4A16, "group_size": W4A16Plan.group}
ZEROS = "weight_zeros"  # a module that has it is W4A16


def w4a16_warnings(plan: ModelPlan) -> tuple[str, ...]:
    """What a user of ComfyUI is to know of modulations in 4 bits. `plan` is of stored modules."""
    if not plan.w4a16:
        return ()
    return (
        f"modulation layers are {W4A16}: ComfyUI loads them from 0.38.1 on, not 0.37, and its LoRA nodes stop at LoRAs "
        f"of modulations, but for the Bypass ones; modulation: keep in the recipe leaves these layers at 16 bits",
    )


def said_by_marker(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> Mapping[str, object]:
    """A module's own metadata. InputError where it has none, or something else than a JSON object."""
    marker = tensors.get(MARKER)
    try:
        said = json_object(json.loads(bytes_text(marker))) if marker is not None else None
    except (ValueError, RecursionError):
        said = None
    if said is None:
        raise InputError(
            f"{plan.name}: {MARKER} is missing or not a JSON object",
            where=plan.name,
            hint="the file is damaged, or packed for another runtime",
        )
    return said


def w4a16_specs(plan: W4A16Plan, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The tensors of an `awq_w4a16` module, without marker and bias: (N, K/2) int8, twice (K/64, N) `dtype`."""
    rows, columns = plan.linear.out_features, plan.linear.in_features
    grouped = TensorSpec((columns // plan.group, rows), dtype)
    return {
        "weight": TensorSpec((rows, columns // 2), torch.int8),
        "weight_scale": grouped,
        ZEROS: grouped,
    }


def encode_w4a16(solution: W4A16Solution) -> dict[str, Tensor]:
    """The tensors that `w4a16_specs` names. ValueError where a zero, counted from the middle code, is not exact."""
    weight, scales, zeros = pack_awq(solution.codes, solution.scales, solution.zeros)
    return {"weight": weight, "weight_scale": scales, ZEROS: zeros}


def decode_w4a16(plan: W4A16Plan, tensors: Mapping[str, Tensor]) -> W4A16Solution:
    """The inverse of `encode_w4a16`, with the bias where there is one. InputError for zeros that no svdq file holds."""
    try:
        found = unpack_awq(tensors["weight"], tensors["weight_scale"], tensors[ZEROS])
    except ValueError as error:
        raise InputError(
            f"{plan.name}: {error}", where=plan.name, hint="the file is damaged, or not from svdq"
        ) from error
    return W4A16Solution(plan, *found, tensors["bias"].clone() if "bias" in tensors else None)
