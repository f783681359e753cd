"""A converted layer on the CUDA kernels, whole and in parts, so that the report shows where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.bench.operations import NAMES, Operation, w4a4_float64, w4a16_float64, without_branch
from svdq_cli.pack.kernel_tiles import unpack_hidden_fragments
from svdq_cli.records import Int4, LayerSolution, W4A4Solution, W4A16Solution
from svdq_cli.runtime.fused import FusedW4A4Linear, FusedW4A16Linear
from svdq_cli.runtime.kernel_linear import KernelW4A4Linear
from svdq_cli.runtime.ops.records import Quantized


def kernel_operations(solution: LayerSolution, m: int) -> Iterator[Operation]:
    """`m`: rows of the input that will be measured."""
    match solution:
        case W4A4Solution():
            bare = without_branch(solution)
            branch = solution.up.shape[1] > 0
            yield _whole(solution)
            if branch:
                yield _whole(bare)
            yield _product(solution, m)
            if branch:
                yield _product(bare, m)
                yield _unfused_branch(solution, m)
                yield _quantize(solution, m)
        case W4A16Solution():
            yield _modulation(solution)


class Product(nn.Module):
    """The GEMM alone, on an input that is quantized already."""

    def __init__(self, layer: KernelW4A4Linear, m: int) -> None:
        super().__init__()
        self.layer, self.m = layer, m

    def forward(self, *quantized: Tensor) -> Tensor:
        """A quantized input of M rows -> (M, N)."""
        codes, scales, hidden = quantized
        return self.layer.multiply((codes, scales, hidden), self.m)


class UnfusedBranch(nn.Module):
    """The GEMM without the branch, and the branch as three separate torch operations: shows what fusing saves."""

    def __init__(self, bare: FusedW4A4Linear, solution: W4A4Solution, m: int) -> None:
        super().__init__()
        self.product = Product(bare, m)
        self.register_buffer("down", solution.down)
        self.register_buffer("up", solution.up)

    def forward(self, x: Tensor, *quantized: Tensor) -> Tensor:
        """(M, K) -> (M, N)."""
        down, up = self.get_buffer("down"), self.get_buffer("up")
        return self.product(*quantized) + F.linear(F.linear(x, down), up)


class Quantize(nn.Module):
    """The first kernel alone: codes, scales and the hidden vector of the branch."""

    def __init__(self, layer: KernelW4A4Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Quantized:
        """`x` is (M, K)."""
        return self.layer.quantize(x)


def _whole(solution: W4A4Solution) -> Operation:
    layer = FusedW4A4Linear(solution)
    return _w4a4("w4a4 linear", "kernels", solution, layer)


def _product(solution: W4A4Solution, m: int) -> Operation:
    layer = FusedW4A4Linear(solution)
    return _w4a4("w4a4 gemm", "kernels", solution, Product(layer, m), prepare=layer.quantize)


def _unfused_branch(solution: W4A4Solution, m: int) -> Operation:
    bare = FusedW4A4Linear(without_branch(solution))
    return _w4a4(
        "w4a4 gemm",
        "kernels + torch branch",
        solution,
        UnfusedBranch(bare, solution, m),
        prepare=lambda x: (x, *bare.quantize(x)),
    )


def _w4a4(op: str, mode: str, solution: W4A4Solution, module: nn.Module, **how) -> Operation:
    dtype = solution.up.dtype
    sums = (
        "exact integers in each group, one float32 fma a group"
        if isinstance(solution.plan.precision, Int4)
        else "float32 sums of exact products"
    )
    return Operation(
        op,
        mode,
        solution.plan.precision.name,
        solution.up.shape[1],
        dtype,
        module,
        lambda x: w4a4_float64(x, solution),
        f"{sums}; result rounded to {NAMES[dtype]}",
        **how,
    )


def _quantize(solution: W4A4Solution, m: int) -> Operation:
    precision = solution.plan.precision
    k, rank = solution.codes.shape[1], solution.up.shape[1]
    scale_bytes = m * k // precision.group * (2 if isinstance(precision, Int4) else 1)
    return quantize_operation(
        FusedW4A4Linear(solution),
        solution,
        mode="kernels",
        hidden_of=lambda quantized: unpack_hidden_fragments(quantized[2])[:m, :rank],
        written=m * k // 2 + scale_bytes,
        m=m,
    )


def quantize_operation(
    layer: KernelW4A4Linear,
    solution: W4A4Solution,
    *,
    mode: str,
    hidden_of: Callable[[Quantized], Tensor],
    written: int,
    m: int,
) -> Operation:
    """The first kernel of a layer. `hidden_of` unpacks the branch's hidden vectors (M, R); `written`: bytes of codes
    and scales."""
    k, rank, dtype = layer.in_features, solution.up.shape[1], solution.up.dtype
    return Operation(
        "quantize and down",
        mode,
        solution.plan.precision.name,
        rank,
        dtype,
        Quantize(layer),
        lambda x: x.double() @ solution.down.double().T,
        f"codes and scales to the bit; float32 sums; hidden vector rounded to {NAMES[dtype]}",
        rows_of=hidden_of,
        least_bytes=2 * m * k + written + 2 * rank * (m + k),
    )


def _modulation(solution: W4A16Solution) -> Operation:
    layer = FusedW4A16Linear(solution)
    dtype = solution.scales.dtype
    return Operation(
        "w4a16 linear",
        "kernels",
        "int4",
        None,
        dtype,
        layer,
        lambda x: w4a16_float64(x, solution),
        f"float32 sums; weight and result rounded to {NAMES[dtype]}",
        least_bytes=sum(tensor.nbytes for tensor in layer.buffers()),
    )
