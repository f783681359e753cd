"""A W4A4 layer's tensors as Hopper's own kernels read them: packed once when a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operations import FEATURES, RANK_STEP, HopperProduct
from svdq_cli.experimental.hopper.tiles import (
    pack_feature_scales,
    pack_rows,
    pack_signed_codes,
    unpack_feature_scales,
    unpack_rows,
    unpack_signed_codes,
)
from svdq_cli.pack.kernel_tiles import pack_down_fragments
from svdq_cli.pack.padding import pad, pad_rows
from svdq_cli.records import Int4, LayerSolution, W4A4Plan, W4A4Solution
from svdq_cli.runtime.linear import RunningBranch, w4a4_weight
from svdq_cli.runtime.operands import unpack_branch
from svdq_cli.runtime.operands import unsupported_reason as portable_reason
from svdq_cli.runtime.ops.records import InputOperands
from svdq_cli.solve.quantizers import E4M3_MAX


@dataclass(frozen=True, slots=True, eq=False)
class HopperOperands:
    """Shapes: `experimental.hopper.tiles`, with N padded to 128 and R to 32."""

    inverse_smooth: Tensor  # (K,) float32
    down: Tensor
    weight: Tensor
    weight_scales: Tensor
    up: Tensor
    bias: Tensor | None  # (NP,) 16-bit

    @property
    def product(self) -> HopperProduct:
        """What the GEMM reads."""
        return HopperProduct(self.weight, self.weight_scales, self.up, self.bias)

    @property
    def input(self) -> InputOperands:
        """What the first kernel reads."""
        return InputOperands(self.inverse_smooth, self.down)


def unsupported_reason(solution: LayerSolution) -> str | None:
    """Why Hopper's own kernels can't run a layer, or None."""
    if reason := portable_reason(solution):
        return reason
    if not (isinstance(solution, W4A4Solution) and isinstance(solution.plan.precision, Int4)):
        return "only int4 W4A4 layers have Hopper kernels"
    return None


def pack_hopper(solution: W4A4Solution, mode: HopperMode) -> HopperOperands:
    """ValueError where `unsupported_reason` has one."""
    if reason := unsupported_reason(solution):
        raise ValueError(f"{solution.plan.name}: {reason}")
    weight, scales = _weight(solution, mode)
    down, up = pack_hopper_branch(solution.down, solution.up)
    return HopperOperands(
        inverse_smooth=1 / solution.smooth.float(),
        down=down,
        weight=weight,
        weight_scales=scales,
        up=up,
        bias=None if solution.bias is None else pad_rows(solution.bias, multiple=FEATURES),
    )


def pack_hopper_branch(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A low-rank branch, (R, K) and (N, R); its rank padded to whole steps."""
    return (
        pack_down_fragments(pad(down, multiples=(RANK_STEP, 1), fill=0)),
        pack_rows(pad(up, multiples=(FEATURES, RANK_STEP), fill=0), tile=FEATURES),
    )


def pack_running(branch: RunningBranch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Another branch of a layer and its bias, (N,) padded to whole tiles."""
    bias = None if branch.bias is None else pad_rows(branch.bias, multiple=FEATURES)
    return (*pack_hopper_branch(branch.down, branch.up), bias)


def unpack_hopper(operands: HopperOperands, plan: W4A4Plan) -> W4A4Solution:
    """The inverse of `pack_hopper` in the modes that keep the checkpoint's 4-bit weights. ValueError for mode FP8."""
    if operands.weight.dtype != torch.int32:
        raise ValueError(
            f"{plan.name}: mode fp8 rounded the weight; the checkpoint's codes are no longer available"
        )
    n, dtype = plan.linear.out_features, operands.up.dtype
    branch = unpack_branch(operands, plan, rows=unpack_rows)
    return W4A4Solution(
        plan=plan,
        smooth=(1 / operands.inverse_smooth).to(dtype),
        down=branch.down,
        up=branch.up,
        codes=unpack_signed_codes(operands.weight)[:n].contiguous(),
        scales=unpack_feature_scales(operands.weight_scales)[:n].contiguous(),
        outer=None,
        bias=branch.bias,
    )


def requantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) float32 -> e4m3 with a float32 scale (N,) for every row, 0 for a row of zeros."""
    scales = weight.abs().amax(-1) / E4M3_MAX
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight / safe.unsqueeze(-1)).to(torch.float8_e4m3fn), scales


def _weight(solution: W4A4Solution, mode: HopperMode) -> tuple[Tensor, Tensor]:
    if mode == HopperMode.FP8:
        rows, scales = requantized_rows(w4a4_weight(solution))
        codes = pad_rows(rows.view(torch.uint8), multiple=FEATURES)
        return pack_rows(codes, tile=FEATURES), pad_rows(scales, multiple=FEATURES)
    return (
        pack_signed_codes(pad_rows(solution.codes, multiple=FEATURES), tile=FEATURES),
        pack_feature_scales(pad_rows(solution.scales, multiple=FEATURES), tile=FEATURES),
    )
