"""Converted linears on the CUDA kernels. On a CPU the same modules run the kernels' references."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from svdq_cli.records import (
    GELU_SHIFT,
    LayerSolution,
    RotatedSolution,
    W4A4Solution,
    W4A16Solution,
)
from svdq_cli.runtime import ops  # noqa: F401  defines torch.ops.svdq
from svdq_cli.runtime.input_quantizer import InputQuantizer
from svdq_cli.runtime.kernel_linear import UNFUSED_RANK, KernelLinear, KernelW4A4Linear
from svdq_cli.runtime.linear import NO_ROTATION, RunningBranch, shift_in_product, w4a4_weight
from svdq_cli.runtime.operands import (
    W4A4Operands,
    W4A16Operands,
    pack_running,
    pack_w4a4,
    pack_w4a16,
    product_tensors,
    tensors_of,
    unpack_branch,
    unpack_w4a4,
    unpack_w4a16,
)
from svdq_cli.runtime.ops.records import Quantized


def with_shifted_bias(solution: W4A4Solution) -> W4A4Solution:
    """The layer for activations that GELU_SHIFT has been added to: the bias takes off what that adds, as in the
    files of runtimes that quantize the output of a GELU without a sign."""
    added = shift_in_product(w4a4_weight(solution), solution.smooth)
    bias = -added if solution.bias is None else solution.bias.float() - added
    return replace(solution, bias=bias.to(solution.up.dtype))


class FusedW4A4Linear(KernelW4A4Linear):
    """A W4A4 layer on the portable kernels: `quantize_down`, then `w4a4_gemm`. `unsigned`: int4 only."""

    weight: Tensor
    weight_scales: Tensor
    outer: Tensor | None

    def __init__(self, solution: W4A4Solution, *, unsigned: bool = False) -> None:
        packed = pack_w4a4(with_shifted_bias(solution) if unsigned else solution)
        shift = GELU_SHIFT if unsigned else 0.0
        quantizer = InputQuantizer(
            torch.ops.svdq.quantize_down,
            packed.inverse_smooth,
            packed.down,
            dtype=packed.up.dtype,
            precision=solution.plan.precision.name,
            unsigned=unsigned,
            shift=shift,
        )
        super().__init__(solution.plan, quantizer, product_tensors(packed), unsigned=unsigned, shift=shift)

    @property
    def operands(self) -> W4A4Operands:
        return W4A4Operands(
            self.quantizer.smoothing,
            self.quantizer.down,
            self.weight,
            self.weight_scales,
            self.up,
            self.outer,
            self.bias,
        )

    @property
    def solution(self) -> W4A4Solution:
        return unpack_w4a4(self.operands, self.plan)

    @property
    def branch(self) -> RunningBranch:
        return unpack_branch(self.operands, self.plan)

    def packed_branch(self, branch: RunningBranch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Down (R, K), up (N, R) and bias (N,) as the kernels read them."""
        return pack_running(branch)

    def multiply(self, quantized: Quantized, m: int) -> Tensor:
        """The layer's output of `m` tokens, (M, N)."""
        return torch.ops.svdq.w4a4_gemm(
            *(*quantized, *self.product),
            m=m,
            n=self.out_features,
            precision=self.plan.precision.name,
            unsigned=self.unsigned,
        )

    def feeds(self, after: KernelW4A4Linear) -> bool:
        same_kind = isinstance(after, FusedW4A4Linear) and after.plan.precision == self.plan.precision
        return same_kind and after.in_features == self.out_features and after.plan.rank < UNFUSED_RANK

    def multiply_gelu_quantize(self, quantized: Quantized, m: int, after: KernelW4A4Linear) -> Quantized:
        return torch.ops.svdq.w4a4_gelu_quantize(
            *(*quantized, *self.product),
            *(after.quantizer.smoothing, after.quantizer.down),
            m=m,
            precision=self.plan.precision.name,
            unsigned=self.unsigned,
            next_unsigned=after.unsigned,
            shift=after.shift,
        )

    def extra_repr(self) -> str:
        precision = self.plan.precision.name
        return f"in_features={self.in_features}, out_features={self.out_features}, {precision}, rank={self.plan.rank}"


class FusedW4A16Linear(KernelLinear):
    """A W4A16 layer in one kernel."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, solution: W4A16Solution) -> None:
        super().__init__(solution.plan, tensors_of(pack_w4a16(solution)))
        self.plan = solution.plan

    @property
    def solution(self) -> W4A16Solution:
        return unpack_w4a16(W4A16Operands(self.weight, self.scales, self.bias), self.plan)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = input.reshape(-1, self.in_features).to(self.scales.dtype).contiguous()
        y = torch.ops.svdq.w4a16_linear(rows, self.weight, self.scales, self.bias, n=self.out_features)
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, w4a16"


class RunsBranch(Protocol):
    """A W4A4 layer on some kernels."""

    in_features: int
    out_features: int

    @property
    def branch(self) -> RunningBranch: ...

    def set_branch(self, branch: RunningBranch) -> None: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


class SplitLinear(nn.Module):
    """A W4A4 layer whose first input channels are quantized with a sign and the others without: two layers, added, as
    the runtimes run it. Both have the same `up`; the first one has the bias."""

    def __init__(self, signed: RunsBranch, unsigned: RunsBranch) -> None:
        super().__init__()
        self.signed, self.unsigned = signed, unsigned
        self.in_features = signed.in_features + unsigned.in_features
        self.out_features = signed.out_features

    @property
    def branch(self) -> RunningBranch:
        first, second = self.signed.branch, self.unsigned.branch
        return replace(first, down=torch.cat((first.down, second.down), dim=1))

    def set_branch(self, branch: RunningBranch) -> None:
        """Another low-rank branch, of any rank, and another bias."""
        start, shift = self.signed.in_features, self.unsigned.branch.bias
        self.signed.set_branch(replace(branch, down=branch.down[:, :start].contiguous()))
        second = replace(branch, down=branch.down[:, start:].contiguous(), bias=shift)
        self.unsigned.set_branch(second)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        first, second = input.split([self.signed.in_features, self.unsigned.in_features], dim=-1)
        return self.signed(first) + self.unsigned(second)


def split_columns(solution: W4A4Solution, start: int) -> tuple[W4A4Solution, W4A4Solution]:
    """The layer's channels before `start`, which keep the bias, and those from it on. Their results add up to the
    layer's. `start` is a multiple of the group size."""
    group = solution.plan.precision.group

    def part(columns: slice, groups: slice, bias: Tensor | None) -> W4A4Solution:
        codes = solution.codes[:, columns]
        linear = replace(solution.plan.linear, in_features=codes.shape[1], bias=bias is not None)
        return replace(
            solution,
            plan=replace(solution.plan, linear=linear),
            smooth=solution.smooth[columns],
            down=solution.down[:, columns],
            codes=codes,
            scales=solution.scales[:, groups],
            bias=bias,
        )

    before = part(slice(None, start), slice(None, start // group), solution.bias)
    return before, part(slice(start, None), slice(start // group, None), None)


def fused_linear(
    solution: LayerSolution, *, unsigned_from: int | None = None
) -> FusedW4A4Linear | FusedW4A16Linear | SplitLinear:
    """The module that runs a solution on the kernels. `unsigned_from`: see `runtime.linear.w4a4_forward`. ValueError
    where `runtime.operands.unsupported_reason` has one."""
    match solution:
        case W4A4Solution():
            if unsigned_from:
                before, after = split_columns(solution, unsigned_from)
                return SplitLinear(FusedW4A4Linear(before), FusedW4A4Linear(after, unsigned=True))
            return FusedW4A4Linear(solution, unsigned=unsigned_from == 0)
        case W4A16Solution():
            return FusedW4A16Linear(solution)
        case RotatedSolution():
            raise ValueError(f"{solution.plan.name}: {NO_ROTATION}")
