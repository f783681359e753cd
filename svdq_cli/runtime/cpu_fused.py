"""Converted linears on the CPU engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svdq_cli.cpu.engine import lack_of_engine
from svdq_cli.errors import UsageError
from svdq_cli.pack.cpu_panels import BLOCK, STEP, pack_down, pack_up
from svdq_cli.pack.padding import ceil_div
from svdq_cli.records import GELU_SHIFT, LayerSolution, RotatedSolution, W4A4Solution, W4A16Solution
from svdq_cli.runtime import ops  # noqa: F401  defines torch.ops.svdq.cpu_*
from svdq_cli.runtime.cpu_operands import (
    CpuOperands,
    CpuW4A16Operands,
    cpu_bias,
    cpu_unsupported_reason,
    pack_cpu,
    pack_cpu_w4a16,
    unpack_cpu,
    unpack_cpu_branch,
    unpack_cpu_w4a16,
)
from svdq_cli.runtime.input_quantizer import InputQuantizer
from svdq_cli.runtime.kernel_linear import FusedFeedForward, KernelLinear, KernelW4A4Linear
from svdq_cli.runtime.linear import NO_ROTATION, RunningBranch
from svdq_cli.runtime.operands import tensors_of
from svdq_cli.runtime.ops.records import Quantized

ROWS_AT_ONCE = 256 * BLOCK  # of a feed-forward


class CpuW4A4Linear(KernelW4A4Linear):
    """`cpu_quantize_down`, then `cpu_w4a4_gemm`. `unsigned_from`: see `runtime.linear.w4a4_forward`."""

    weight_codes: Tensor
    weight_scales: Tensor
    outer: Tensor | None
    shifted: Tensor | None
    own_bias: Tensor | None  # (N,) 16-bit, as the file has it

    def __init__(self, solution: W4A4Solution, *, unsigned_from: int | None = None) -> None:
        packed = pack_cpu(solution, unsigned_from=unsigned_from)
        shift = 0.0 if unsigned_from is None else GELU_SHIFT
        quantizer = InputQuantizer(
            *(torch.ops.svdq.cpu_quantize_down, packed.smooth, packed.down),
            dtype=packed.up.dtype,
            takes_any_rows=True,
            precision=solution.plan.precision.name,
            unsigned_from=unsigned_from,
            shift=shift,
        )
        product = {name: each for name, each in tensors_of(packed).items() if name not in ("smooth", "down")}
        super().__init__(solution.plan, quantizer, product, unsigned=unsigned_from is not None, shift=shift)
        self.unsigned_from = unsigned_from
        self.register_buffer("own_bias", solution.bias)

    @property
    def operands(self) -> CpuOperands:
        return CpuOperands(self.quantizer.smoothing, self.quantizer.down, *self._product, self.shifted)

    @property
    def _product(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight_codes, self.weight_scales, self.up, self.outer, self.bias

    @property
    def solution(self) -> W4A4Solution:
        return unpack_cpu(self.operands, self.plan, self.own_bias)

    @property
    def branch(self) -> RunningBranch:
        return unpack_cpu_branch(self.operands, self.plan, self.own_bias)

    def packed_branch(self, branch: RunningBranch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Down (R, K), up (N, R) and bias (N,) as the engine reads them."""
        return pack_down(branch.down), pack_up(branch.up), cpu_bias(branch.bias, self.shifted)

    def set_branch(self, branch: RunningBranch) -> None:
        super().set_branch(branch)
        self.own_bias = branch.bias

    def quantize(self, x: Tensor) -> Quantized:
        """Codes, scales and hidden of `x` (..., K), packed."""
        _refuse_gradients(x)
        return super().quantize(x)

    def multiply(self, quantized: Quantized, m: int) -> Tensor:
        """The layer's output of `m` tokens, (M, N)."""
        return self._multiply(quantized, m, float32=False)

    def finished(self, quantized: Quantized, x: Tensor) -> Tensor:
        """The result in the shape of the input `x` (..., K): (..., N)."""
        y = self._multiply(quantized, x.shape[:-1].numel(), float32=x.dtype == torch.float32)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, quantized: Quantized, m: int, *, float32: bool) -> Tensor:
        return torch.ops.svdq.cpu_w4a4_gemm(
            *(*quantized, *self._product),
            m=m,
            n=self.out_features,
            k=self.in_features,
            precision=self.plan.precision.name,
            float32=float32,
        )

    def feeds(self, after: KernelW4A4Linear) -> bool:
        same_kind = isinstance(after, CpuW4A4Linear) and after.plan.precision == self.plan.precision
        return same_kind and after.in_features == self.out_features

    def beside_attention(self, after: KernelW4A4Linear) -> FusedFeedForward | None:
        if not isinstance(after, CpuW4A4Linear) or after.plan.precision != self.plan.precision:
            return None
        width = after.in_features - self.out_features
        return FeedForwardBesideAttention(self, after) if width > 0 and width % STEP == 0 else None

    def parts(self, quantized: Quantized, m: int) -> Iterator[tuple[slice, Quantized]]:
        """Row ranges of a feed-forward, chosen so that its codes take a third of the memory at 4608 rows, and less of
        the caches."""
        if m <= ROWS_AT_ONCE or torch.compiler.is_compiling():
            yield slice(0, m), quantized
            return
        codes, scales, hidden = quantized
        for start in range(0, m, ROWS_AT_ONCE):
            some = slice(start, min(start + ROWS_AT_ONCE, m))
            blocks = slice(start // BLOCK, ceil_div(some.stop, BLOCK))
            yield some, (codes[blocks], scales[:, blocks], hidden[blocks])

    def multiply_gelu_quantize(
        self, quantized: Quantized, m: int, after: KernelW4A4Linear, before: Tensor | None = None
    ) -> Quantized:
        """The quantized input of the layer `after`, of `m` tokens. `before`: its first columns, (M, columns), where
        they come from elsewhere."""
        assert isinstance(after, CpuW4A4Linear)
        if before is not None:
            _refuse_gradients(before)
            before = after.quantizer.rows(before)
        return torch.ops.svdq.cpu_w4a4_gelu_quantize(
            *(*quantized, *self._product),
            *(after.quantizer.smoothing, after.quantizer.down, before),
            m=m,
            k=self.in_features,
            precision=self.plan.precision.name,
            next_unsigned_from=after.unsigned_from,
            shift=after.shift,
        )

    def extra_repr(self) -> str:
        precision = self.plan.precision.name
        return f"in_features={self.in_features}, out_features={self.out_features}, {precision}, rank={self.plan.rank}"


class FeedForwardBesideAttention(FusedFeedForward):
    """The MLP of a block that runs next to its attention: a last layer of the attention's output and, after it, GELU by
    tanh of a first layer. The MLP's activation is never written."""

    def __init__(self, first: CpuW4A4Linear, second: CpuW4A4Linear) -> None:
        super().__init__(first, second)
        self.in_features = second.in_features - first.out_features + first.in_features
        self.out_features = second.out_features

    def _fused(self, x: Tensor) -> Tensor:
        """`x` (..., attention's width + the first layer's in features)."""
        width = self.second.in_features - self.first.out_features
        attention, own = x.split([width, self.first.in_features], -1)
        return self.joined(attention, self.first.quantize(own))

    def _between(self, rows: Tensor, quantized: Quantized) -> Quantized:
        assert isinstance(self.first, CpuW4A4Linear)
        return self.first.multiply_gelu_quantize(quantized, rows.shape[0], self.second, rows)


class CpuW4A16Linear(KernelLinear):
    """A W4A16 layer in one operator."""

    weight_codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, solution: W4A16Solution) -> None:
        super().__init__(solution.plan, tensors_of(pack_cpu_w4a16(solution)))
        self.plan = solution.plan

    @property
    def solution(self) -> W4A16Solution:
        return unpack_cpu_w4a16(CpuW4A16Operands(self.weight_codes, self.scales, self.bias), self.plan)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        _refuse_gradients(input)
        rows = input.reshape(-1, self.in_features).to(self.scales.dtype).contiguous()
        y = torch.ops.svdq.cpu_w4a16_linear(
            rows, self.weight_codes, self.scales, self.bias, n=self.out_features
        )
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, w4a16"


def cpu_linear(
    solution: LayerSolution, *, unsigned_from: int | None = None
) -> CpuW4A4Linear | CpuW4A16Linear:
    """The module that runs a solution on the engine. ValueError where `cpu_operands.cpu_unsupported_reason` has one."""
    match solution:
        case W4A4Solution():
            return CpuW4A4Linear(solution, unsigned_from=unsigned_from)
        case W4A16Solution():
            return CpuW4A16Linear(solution)
        case RotatedSolution():
            raise ValueError(f"{solution.plan.name}: {NO_ROTATION}")


def engine_linear(solution: LayerSolution) -> CpuW4A4Linear | CpuW4A16Linear | None:
    """The module that runs a solution in main memory, several times faster than plain torch and with results within
    one rounding of its; None where there is no engine, or it can't run this layer."""
    on_cpu = solution.codes.device.type == "cpu"
    return (
        cpu_linear(solution)
        if on_cpu and lack_of_engine() is None and cpu_unsupported_reason(solution) is None
        else None
    )


def _refuse_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError(
            "a converted layer computes no gradients",
            hint="train on the 16-bit model, or run this one under torch.no_grad()",
            kind="no-gradients",
        )
