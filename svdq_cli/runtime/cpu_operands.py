"""A solution's tensors as the CPU engine reads them: packed once when a model is loaded, unpacked to the same numbers.

Four bits stay four bits: what is multiplied is stored in memory as it does in a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.pack.cpu_panels import (
    PANEL,
    STEP,
    pack_codes,
    pack_down,
    pack_scales,
    pack_up,
    unpack_codes,
    unpack_down,
    unpack_scales,
    unpack_up,
)
from svdq_cli.pack.padding import pad, pad_rows
from svdq_cli.records import (
    Int4,
    LayerSolution,
    NvFp4,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.runtime.linear import NO_ROTATION, RunningBranch, shift_in_product, w4a4_weight

# Activations and weights are multiplied as twice their e2m1 values, and e4m3 scales as 2^-8 of theirs
_OUTER = 2.0**6
_OFFSET = 8  # of int4 codes, which the engine reads without a sign


@dataclass(frozen=True, slots=True, eq=False)
class CpuOperands:
    """A W4A4 layer. Shapes: `pack.cpu_panels`, with N padded to NP = whole panels and K to 64."""

    smooth: Tensor  # (K,) 16-bit
    down: Tensor
    weight_codes: Tensor  # not `weight`, which would be taken for the 16-bit layer's
    weight_scales: Tensor
    up: Tensor
    outer: Tensor | None  # (NP,) float32 times 2^6, nvfp4 only
    bias: Tensor | None  # (NP,) float32, less what the shift of unsigned channels adds
    shifted: Tensor | None  # (N,) float32: what that is


@dataclass(frozen=True, slots=True, eq=False)
class CpuW4A16Operands:
    """A W4A16 layer."""

    weight_codes: Tensor  # not `weight`, which would be taken for the 16-bit layer's
    scales: Tensor  # (NP/16, K/64, 2, 16): scales and zeros
    bias: Tensor | None  # (NP,) 16-bit


def cpu_unsupported_reason(solution: LayerSolution) -> str | None:
    """Why the engine can't run a layer, or None."""
    k = solution.codes.shape[1]
    if isinstance(solution, RotatedSolution):
        return NO_ROTATION
    if isinstance(solution, W4A16Solution):
        return f"in_features {k} is not a multiple of {STEP}" if k % STEP else None
    if isinstance(solution.plan.precision, NvFp4):
        scales = solution.scales.float()
        if not bool((scales >= 0).all()):
            return "a micro scale is negative or not a number"
    return None


def pack_cpu(solution: W4A4Solution, *, unsigned_from: int | None = None) -> CpuOperands:
    """ValueError where `cpu_unsupported_reason` has one. `unsigned_from`: see `runtime.linear.w4a4_forward`."""
    if reason := cpu_unsupported_reason(solution):
        raise ValueError(f"{solution.plan.name}: {reason}")
    codes = solution.codes
    match solution.plan.precision:
        case Int4():
            nibbles, scales, outer = (codes + _OFFSET).to(torch.uint8), solution.scales, None
        case NvFp4():
            nibbles, scales = codes.to(torch.uint8), solution.scales.view(torch.uint8)
            assert solution.outer is not None
            outer = pad_rows(solution.outer.float().expand(codes.shape[0]) * _OUTER, multiple=PANEL)
    shifted = None
    if unsigned_from is not None:
        start, group = unsigned_from, solution.plan.precision.group
        part = W4A4Solution(
            solution.plan,
            *(solution.smooth[start:], solution.down, solution.up, codes[:, start:]),
            *(solution.scales[:, start // group :], solution.outer, None),
        )
        shifted = shift_in_product(w4a4_weight(part), part.smooth)
    padded_k = pad(nibbles, multiples=(PANEL, STEP), fill=0)
    return CpuOperands(
        smooth=solution.smooth,
        down=pack_down(solution.down),
        weight_codes=pack_codes(padded_k),
        weight_scales=pack_scales(
            pad(scales, multiples=(PANEL, STEP // solution.plan.precision.group), fill=0)
        ),
        up=pack_up(solution.up),
        outer=outer,
        bias=cpu_bias(solution.bias, shifted),
        shifted=shifted,
    )


def cpu_bias(bias: Tensor | None, shifted: Tensor | None) -> Tensor | None:
    """What is added to a product, (NP,) float32: a layer's bias less what the shift of its unsigned channels adds."""
    if shifted is None:
        return None if bias is None else pad_rows(bias.float(), multiple=PANEL)
    return pad_rows(-shifted if bias is None else bias.float() - shifted, multiple=PANEL)


def unpack_cpu(operands: CpuOperands, plan: W4A4Plan, bias: Tensor | None) -> W4A4Solution:
    """The inverse of `pack_cpu`. `bias`: the layer's own. It is (N,)."""
    n, k, dtype = plan.linear.out_features, plan.linear.in_features, operands.up.dtype
    nibbles = unpack_codes(operands.weight_codes)[:n, :k]
    scales = unpack_scales(operands.weight_scales)[:n, : k // plan.precision.group].contiguous()
    match plan.precision:
        case Int4():
            codes, outer = nibbles.to(torch.int8) - _OFFSET, None
        case NvFp4():
            codes, scales = nibbles.to(torch.int8), scales.view(torch.float8_e4m3fn)
            assert operands.outer is not None
            outer = (operands.outer[:n] / _OUTER).to(dtype)
            outer = outer[:1] if bool((outer == outer[0]).all()) else outer
    branch = unpack_cpu_branch(operands, plan, bias)
    return W4A4Solution(
        plan, operands.smooth, branch.down, branch.up, codes.contiguous(), scales, outer, branch.bias
    )


def unpack_cpu_branch(operands: CpuOperands, plan: W4A4Plan, bias: Tensor | None) -> RunningBranch:
    """The bytes of a packed layer besides its codes. `bias`: (N,), the layer's own."""
    n, k = plan.linear.out_features, plan.linear.in_features
    return RunningBranch(
        down=unpack_down(operands.down)[: plan.rank, :k].contiguous(),
        up=unpack_up(operands.up)[:n, : plan.rank].contiguous(),
        bias=bias,
    )


def pack_cpu_w4a16(solution: W4A16Solution) -> CpuW4A16Operands:
    """ValueError where `cpu_unsupported_reason` has one."""
    if reason := cpu_unsupported_reason(solution):
        raise ValueError(f"{solution.plan.name}: {reason}")
    pairs = [pack_scales(pad_rows(part, multiple=PANEL)) for part in (solution.scales, solution.zeros)]
    return CpuW4A16Operands(
        weight_codes=pack_codes(pad_rows(solution.codes, multiple=PANEL)),
        scales=torch.stack(pairs, 2),
        bias=None if solution.bias is None else pad_rows(solution.bias, multiple=PANEL),
    )


def unpack_cpu_w4a16(operands: CpuW4A16Operands, plan: W4A16Plan) -> W4A16Solution:
    """The inverse of `pack_cpu_w4a16`."""
    n = plan.linear.out_features
    scales, zeros = (unpack_scales(part.contiguous())[:n].contiguous() for part in operands.scales.unbind(2))
    return W4A16Solution(
        plan=plan,
        codes=unpack_codes(operands.weight_codes)[:n].contiguous(),
        scales=scales,
        zeros=zeros,
        bias=None if operands.bias is None else operands.bias[:n],
    )
