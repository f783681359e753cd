"""A converted int4 layer in the modes of Hopper's own kernels, whole and in parts. Each row is measured against its own
mode's definition in float64; `exactness` says how that differs from the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from svdq_cli.bench.kernel_operations import Product, quantize_operation
from svdq_cli.bench.operations import NAMES, Operation, w4a4_float64, without_branch
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import requantized_rows
from svdq_cli.experimental.hopper.reference import quantize_rows
from svdq_cli.experimental.hopper.tiles import unpack_rows
from svdq_cli.records import W4A4Solution
from svdq_cli.runtime.linear import w4a4_weight


def hopper_operations(solution: W4A4Solution, m: int) -> Iterator[Operation]:
    """`m`: rows of the input that will be measured."""
    bare = without_branch(solution)
    for mode in HopperMode:
        layer = HopperW4A4Linear(solution, mode)
        yield _row("w4a4 linear", solution, mode, layer)
        yield _row("w4a4 gemm", solution, mode, Product(layer, m), prepare=layer.quantize)
        if solution.up.shape[1] > 0:
            without = HopperW4A4Linear(bare, mode)
            yield _row("w4a4 gemm", bare, mode, Product(without, m), prepare=without.quantize)
            yield _quantize(solution, mode, layer, m)


def hopper_float64(x: Tensor, solution: W4A4Solution, mode: HopperMode) -> Tensor:
    """A mode's definition in float64; mode EXACT's is the layer's contract value. `x` (M, K) in the layer's dtype."""
    if mode == HopperMode.EXACT:
        return w4a4_float64(x, solution)
    inverse_smooth = 1 / solution.smooth.float()
    codes, scales = quantize_rows(x, inverse_smooth, mode=mode, unsigned=False, shift=0.0)
    y = (codes.double() * scales.double()) @ _weight_float64(solution, mode).T
    y = y + (x.double() @ solution.down.double().T) @ solution.up.double().T
    return y if solution.bias is None else y + solution.bias.double()


def _weight_float64(solution: W4A4Solution, mode: HopperMode) -> Tensor:
    weight = w4a4_weight(solution)
    if mode == HopperMode.FP8:
        rows, scales = requantized_rows(weight)
        return rows.double() * scales.double().unsqueeze(-1)
    return weight.double()


def _row(op: str, solution: W4A4Solution, mode: HopperMode, module: nn.Module, **how) -> Operation:
    dtype = solution.up.dtype
    return Operation(
        op,
        f"hopper {mode.label}",
        solution.plan.precision.name,
        solution.up.shape[1],
        dtype,
        module,
        lambda x: hopper_float64(x, solution, mode),
        f"{mode.exactness}; result rounded to {NAMES[dtype]}",
        **how,
    )


def _quantize(solution: W4A4Solution, mode: HopperMode, layer: HopperW4A4Linear, m: int) -> Operation:
    k, rank = layer.in_features, solution.up.shape[1]
    scales = m * k // solution.plan.precision.group if mode == HopperMode.EXACT else m
    return quantize_operation(
        layer,
        solution,
        mode=f"hopper {mode.label}",
        hidden_of=lambda quantized: unpack_rows(quantized[2])[:m, :rank],
        written=m * k + 4 * scales,
        m=m,
    )
