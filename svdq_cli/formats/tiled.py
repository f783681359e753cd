"""The tensors that Nunchaku's kernels read, shared by the formats of its runtimes: without nvfp4's outer scales, which
each of them stores in its own way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdq_cli.formats.contract import Branch
from svdq_cli.formats.soundness import require_sound, scale_dtype
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
    NvFp4,
    RotatedPlan,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.storage.tensor_file import TensorSpec

MAX_RANK = 1024  # the kernels take at most 64 low-rank scales, one per 16 ranks


def unsupported_reason(layer: LayerPlan) -> str | None:
    """Why the kernels behind this format can't run `layer`, or None."""
    rows, columns = layer.linear.out_features, layer.linear.in_features
    match layer:
        case W4A4Plan(rank=0):
            return "it has no low-rank branch, which Nunchaku's kernels need"
        case W4A4Plan(rank=rank):
            if rank < 0 or rank % 16 or rank > MAX_RANK:
                return f"rank {rank} is not a multiple of 16 from 16 to {MAX_RANK}"
            row_tile, column_tile = 128, 128
        case W4A16Plan():
            row_tile, column_tile = 8, 64
        case RotatedPlan():
            return "Nunchaku's kernels have no rotated layers"
    if rows % row_tile:
        return f"out_features {rows} is not a multiple of {row_tile}"
    if columns % column_tile:
        return f"in_features {columns} is not a multiple of {column_tile}"
    return None


def tensor_specs(layer: LayerPlan, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The tensors of one module, by suffix."""
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
        case W4A16Plan(group=group):
            specs = {
                "qweight": TensorSpec((rows // 4, columns // 2), torch.int32),
                "wscales": TensorSpec((columns // group, rows), dtype),
                "wzeros": TensorSpec((columns // group, rows), dtype),
            }
        case RotatedPlan():
            raise ValueError(f"{layer.name}: {unsupported_reason(layer)}")
    if linear.bias:
        specs["bias"] = TensorSpec((rows,), dtype)
    return specs


def encode(solution: LayerSolution) -> dict[str, Tensor]:
    """One module as its stored tensors. ValueError where it does not fit or contradicts its plan."""
    if reason := unsupported_reason(solution.plan):
        raise ValueError(f"{solution.plan.name}: {reason}")
    require_sound(solution)
    match solution:
        case W4A4Solution():
            return _encode_w4a4(solution)
        case W4A16Solution():
            return _encode_w4a16(solution)
        case RotatedSolution():  # refused above
            raise AssertionError(solution.plan.name)


def decode(layer: LayerPlan, tensors: Mapping[str, Tensor], outer: Tensor | None) -> LayerSolution:
    """The inverse of `encode`, for tensors whose names and shapes are known to be right. `outer` is (1,) or (N,)."""
    match layer:
        case W4A4Plan():
            return _decode_w4a4(layer, tensors, outer)
        case W4A16Plan():
            return _decode_w4a16(layer, tensors)
        case RotatedPlan():
            raise ValueError(f"{layer.name}: {unsupported_reason(layer)}")


def encode_branch(branch: Branch) -> dict[str, Tensor]:
    """The branch of a module as its stored tensors."""
    return {"proj_down": pack_down(branch.down), "proj_up": pack_up(branch.up)}


def decode_branch(tensors: Mapping[str, Tensor]) -> Branch:
    """The inverse of `encode_branch`; `tensors` may hold others of the module too."""
    return Branch(down=unpack_down(tensors["proj_down"]), up=unpack_up(tensors["proj_up"]))


def _encode_w4a4(solution: W4A4Solution) -> dict[str, Tensor]:
    precision = solution.plan.precision
    tensors = {
        "qweight": pack_codes(solution.codes, precision),
        "smooth_factor": pack_vector(solution.smooth),
        **encode_branch(Branch(solution.down, solution.up)),
    }
    match precision:
        case Int4():
            tensors["wscales"] = pack_scales(solution.scales)
        case NvFp4():
            tensors["wscales"] = pack_micro_scales(solution.scales)
    if solution.bias is not None:
        tensors["bias"] = pack_vector(solution.bias)
    return tensors


def _encode_w4a16(solution: W4A16Solution) -> dict[str, Tensor]:
    tensors = {
        "qweight": pack_w4a16_codes(solution.codes),
        "wscales": pack_w4a16_scales(solution.scales),
        "wzeros": pack_w4a16_scales(solution.zeros),
    }
    if solution.bias is not None:
        tensors["bias"] = solution.bias.clone()
    return tensors


def _decode_w4a4(layer: W4A4Plan, tensors: Mapping[str, Tensor], outer: Tensor | None) -> W4A4Solution:
    match layer.precision:
        case Int4():
            scales = unpack_scales(tensors["wscales"])
        case NvFp4():
            scales = unpack_micro_scales(tensors["wscales"])
    branch = decode_branch(tensors)
    return W4A4Solution(
        plan=layer,
        smooth=unpack_vector(tensors["smooth_factor"]),
        down=branch.down,
        up=branch.up,
        codes=unpack_codes(tensors["qweight"], layer.precision),
        scales=scales,
        outer=outer,
        bias=unpack_vector(tensors["bias"]) if "bias" in tensors else None,
    )


def _decode_w4a16(layer: W4A16Plan, tensors: Mapping[str, Tensor]) -> W4A16Solution:
    return W4A16Solution(
        plan=layer,
        codes=unpack_w4a16_codes(tensors["qweight"]),
        scales=unpack_w4a16_scales(tensors["wscales"]),
        zeros=unpack_w4a16_scales(tensors["wzeros"]),
        bias=tensors["bias"].clone() if "bias" in tensors else None,
    )
