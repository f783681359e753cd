"""Converted int4 linears on Hopper's own kernels. On a CPU the same modules run the kernels' references."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.experimental.hopper import operators  # noqa: F401  defines torch.ops.svdq.hopper_*
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import (
    HopperOperands,
    pack_hopper,
    pack_running,
    unpack_hopper,
)
from svdq_cli.experimental.hopper.tiles import unpack_rows
from svdq_cli.records import GELU_SHIFT, W4A4Solution
from svdq_cli.runtime.fused import SplitLinear, split_columns, with_shifted_bias
from svdq_cli.runtime.input_quantizer import InputQuantizer
from svdq_cli.runtime.kernel_linear import UNFUSED_RANK, KernelW4A4Linear
from svdq_cli.runtime.linear import RunningBranch
from svdq_cli.runtime.operands import product_tensors, unpack_branch
from svdq_cli.runtime.ops.records import Quantized


class HopperW4A4Linear(KernelW4A4Linear):
    """An int4 layer on Hopper's own kernels: `hopper_quantize_down`, then `hopper_gemm`.

    `unsigned` in mode EXACT only: other modes quantize to e4m3, which needs no shift.
    """

    weight: Tensor
    weight_scales: Tensor

    def __init__(self, solution: W4A4Solution, mode: HopperMode, *, unsigned: bool = False) -> None:
        shifted = unsigned and mode == HopperMode.EXACT
        packed = pack_hopper(with_shifted_bias(solution) if shifted else solution, mode)
        shift = GELU_SHIFT if shifted else 0.0
        quantizer = InputQuantizer(
            torch.ops.svdq.hopper_quantize_down,
            packed.inverse_smooth,
            packed.down,
            dtype=packed.up.dtype,
            mode=mode.label,
            unsigned=shifted,
            shift=shift,
            n=solution.plan.linear.out_features,
        )
        super().__init__(solution.plan, quantizer, product_tensors(packed), unsigned=shifted, shift=shift)
        self.mode = mode

    @property
    def operands(self) -> HopperOperands:
        return HopperOperands(
            self.quantizer.smoothing,
            self.quantizer.down,
            self.weight,
            self.weight_scales,
            self.up,
            self.bias,
        )

    @property
    def solution(self) -> W4A4Solution:
        """The solution as it is run: with a shifted bias where `unsigned`. ValueError in mode FP8, which keeps no 4-bit
        codes."""
        return unpack_hopper(self.operands, self.plan)

    @property
    def branch(self) -> RunningBranch:
        return unpack_branch(self.operands, self.plan, rows=unpack_rows)

    def packed_branch(self, branch: RunningBranch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Down (R, K), up (N, R) and bias (N,) as the kernels read them."""
        return pack_running(branch)

    def multiply(self, quantized: Quantized, m: int) -> Tensor:
        """The layer's output of `m` tokens, (M, N)."""
        return torch.ops.svdq.hopper_gemm(
            *quantized, *self.product, m=m, n=self.out_features, mode=self.mode.label
        )

    def feeds(self, after: KernelW4A4Linear) -> bool:
        exact = isinstance(after, HopperW4A4Linear) and self.mode == after.mode == HopperMode.EXACT
        return exact and after.in_features == self.out_features and after.plan.rank < UNFUSED_RANK

    def multiply_gelu_quantize(self, quantized: Quantized, m: int, after: KernelW4A4Linear) -> Quantized:
        return torch.ops.svdq.hopper_gelu_quantize(
            *(*quantized, *self.product),
            *(after.quantizer.smoothing, after.quantizer.down),
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
