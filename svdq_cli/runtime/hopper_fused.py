"""Converted int4 linears on Hopper's own kernels. On a CPU the same modules run the kernels' twins."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from svdq_cli.gpu.hopper_modes import HopperMode
from svdq_cli.records import GELU_SHIFT, W4A4Solution
from svdq_cli.runtime import hopper_operators  # noqa: F401  defines torch.ops.svdq.hopper_*
from svdq_cli.runtime.fused import (
    FusedLinear,
    Quantized,
    SplitLinear,
    split_columns,
    with_shifted_bias,
)
from svdq_cli.runtime.hopper_operands import (
    HopperOperands,
    hopper_tensors,
    pack_hopper,
    pack_hopper_bias,
    pack_hopper_branch,
    unpack_hopper,
    unpack_hopper_branch,
)
from svdq_cli.runtime.linear import RunningBranch


class HopperW4A4Linear(FusedLinear):
    """An int4 W4A4 layer in two kernels: `hopper_quantize_down`, then `hopper_gemm`.

    `unsigned`, in mode EXACT: as in FusedW4A4Linear. Other modes quantize to e4m3, which needs no shift.
    """

    inverse_smooth: Tensor
    down: Tensor
    weight: Tensor
    weight_scales: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(self, solution: W4A4Solution, mode: HopperMode, *, unsigned: bool = False) -> None:
        shifted = unsigned and mode == HopperMode.EXACT
        as_run = with_shifted_bias(solution) if shifted else solution
        super().__init__(solution.plan, hopper_tensors(pack_hopper(as_run, mode)))
        self.plan, self.mode, self.unsigned = solution.plan, mode, shifted
        self.shift = GELU_SHIFT if shifted else 0.0

    @property
    def operands(self) -> HopperOperands:
        return HopperOperands(
            self.inverse_smooth, self.down, self.weight, self.weight_scales, self.up, self.bias
        )

    @property
    def solution(self) -> W4A4Solution:
        """As it is run: with a shifted bias where `unsigned`. ValueError in mode FP8, which keeps no 4-bit codes."""
        return unpack_hopper(self.operands, self.plan)

    @property
    def branch(self) -> RunningBranch:
        return unpack_hopper_branch(self.operands, self.plan)

    def set_branch(self, branch: RunningBranch) -> None:
        """Another low-rank branch, of any rank, and another bias."""
        self.plan = replace(self.plan, rank=branch.down.shape[0])
        self.down, self.up = pack_hopper_branch(branch.down, branch.up)
        self.bias = None if branch.bias is None else pack_hopper_bias(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = self.multiply(self.quantize(rows), rows.shape[0])
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def quantize(self, rows: Tensor) -> Quantized:
        """`rows` (M, K) in any float dtype."""
        return torch.ops.svdq.hopper_quantize_down(
            rows.to(self.up.dtype).contiguous(),
            self.inverse_smooth,
            self.down,
            mode=self.mode.label,
            unsigned=self.unsigned,
            shift=self.shift,
        )

    def multiply(self, quantized: Quantized, m: int) -> Tensor:
        """(M, N) in the checkpoint's dtype."""
        return torch.ops.svdq.hopper_gemm(
            *quantized, *self.operands.product, m=m, n=self.out_features, mode=self.mode.label
        )

    def multiply_gelu_quantize(self, quantized: Quantized, m: int, after: HopperW4A4Linear) -> Quantized:
        """This layer's product, GELU by tanh, and the input of the layer `after`. Both in mode EXACT."""
        return torch.ops.svdq.hopper_gelu_quantize(
            *(*quantized, *self.operands.product, after.inverse_smooth, after.down),
            m=m,
            next_unsigned=after.unsigned,
            shift=after.shift,
        )

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, int4, rank={self.plan.rank}, mode={self.mode.label}"


def hopper_linear(
    solution: W4A4Solution, mode: HopperMode, *, unsigned_from: int | None = None
) -> HopperW4A4Linear | SplitLinear:
    """The module that runs a solution in a mode. `unsigned_from`: see `runtime.linear.w4a4_forward`."""
    if unsigned_from and mode == HopperMode.EXACT:
        before, after = split_columns(solution, unsigned_from)
        return SplitLinear(HopperW4A4Linear(before, mode), HopperW4A4Linear(after, mode, unsigned=True))
    return HopperW4A4Linear(solution, mode, unsigned=unsigned_from == 0)


class HopperFeedForward(nn.Module):
    """Linear, GELU by tanh, linear, in mode EXACT: the activation between the two is never written."""

    def __init__(self, first: HopperW4A4Linear, second: HopperW4A4Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.first.in_features)
        m = rows.shape[0]
        between = self.first.multiply_gelu_quantize(self.first.quantize(rows), m, self.second)
        y = self.second.multiply(between, m)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.second.out_features)


def hopper_feed_forward(first: nn.Module, second: nn.Module) -> HopperFeedForward | None:
    """The two layers as one module; None for other kinds, other modes, or sizes that don't meet."""
    if not (isinstance(first, HopperW4A4Linear) and isinstance(second, HopperW4A4Linear)):
        return None
    exact = first.mode == second.mode == HopperMode.EXACT
    return HopperFeedForward(first, second) if exact and first.out_features == second.in_features else None
