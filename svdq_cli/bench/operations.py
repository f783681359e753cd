"""What is measured on every device: torch's linear and the reference backend's, with definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.records import LayerSolution, RotatedSolution, W4A4Solution, W4A16Solution
from svdq_cli.runtime.linear import quantized_linear, w4a4_weight
from svdq_cli.solve.forward import sixteen_bit_of
from svdq_cli.solve.quantizers import quantize_activation
from svdq_cli.solve.rotation import fake_quantize_rows, rotate, rotated_weight

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
ROTATED = "rotated"  # how the operations of ConvRot's layers begin


def just_x(x: Tensor) -> tuple[Tensor, ...]:
    """An input (M, K) as the arguments of an operation that takes nothing else."""
    return (x,)


def just_result(result: Tensor) -> Tensor:
    """A result (M, N) as it is."""
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One way to compute a linear layer."""

    op: str
    mode: str
    precision: str
    rank: int | None
    dtype: torch.dtype  # of the input it is measured with
    module: nn.Module
    define: Callable[[Tensor], Tensor]  # x (M, K) -> (M, N) float64, unrounded
    exactness: str
    # x -> the module's inputs, outside the measured time
    prepare: Callable[[Tensor], tuple[Tensor, ...]] = just_x
    rows_of: Callable[[Any], Tensor] = just_result  # the module's result -> (M, N)
    least_bytes: int | None = None  # to read and write, where these decide the time

    @property
    def label(self) -> str:
        return f"{self.mode} {self.op} {self.precision}"


def torch_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Operation:
    """The baseline: torch.nn.Linear with its weight (N, K) in `dtype`."""
    n, k = weight.shape
    module = nn.Linear(k, n, bias=bias is not None, device=weight.device, dtype=dtype)
    module.requires_grad_(False)
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)

    def define(x: Tensor) -> Tensor:
        y = F.linear(x.double(), module.weight.double())
        return y if bias is None else y + module.bias.double()

    name = NAMES[dtype]
    exactness = (
        "float32 operands and sums"
        if dtype == torch.float32
        else f"{name} operands; result rounded to {name}"
    )
    return Operation("linear", "torch", name, None, dtype, module, define, exactness)


def reference_linear(solution: LayerSolution) -> Operation:
    """A converted layer as the reference backend runs it."""
    module = quantized_linear(solution)
    match solution:
        case W4A4Solution():
            dtype = solution.up.dtype
            rank = solution.up.shape[1]
            sums = "float32 sums of exact products"
            if (
                solution.scales.dtype == torch.float16
            ):  # 3 + 11 bits a side: the product has more than float32 keeps
                sums = "float32 sums of float32 products"
            rounded = "hidden vector and result" if rank else "result"
            return Operation(
                "w4a4 linear",
                "reference",
                solution.plan.precision.name,
                rank,
                dtype,
                module,
                lambda x: w4a4_float64(x, solution),
                f"{sums}; {rounded} rounded to {NAMES[dtype]}",
            )
        case W4A16Solution():
            dtype = solution.scales.dtype
            return Operation(
                "w4a16 linear",
                "reference",
                "int4",
                None,
                dtype,
                module,
                lambda x: w4a16_float64(x, solution),
                f"float32 sums; weight and result rounded to {NAMES[dtype]}",
            )
        case RotatedSolution():
            dtype = sixteen_bit_of(solution, torch.bfloat16)
            return Operation(
                f"{ROTATED} w4a{solution.plan.activation_bits} linear",
                "reference",
                "int4",
                None,
                dtype,
                module,
                lambda x: rotated_float64(x, solution),
                f"rotated, quantized and summed in float32; result rounded to {NAMES[dtype]}",
            )


def without_branch(solution: W4A4Solution) -> W4A4Solution:
    """A 4-bit layer without its low-rank branch: the difference to the whole layer is the cost of the branch."""
    plan = replace(solution.plan, rank=0)
    return replace(solution, plan=plan, down=solution.down[:0], up=solution.up[:, :0])


def w4a4_float64(x: Tensor, solution: W4A4Solution) -> Tensor:
    """The layer's contract value in float64: y = qa(x / smooth) . (codes * scales * outer)^T + (x down^T) up^T + bias.

    How an activation becomes codes and scales is part of the contract and done as the runtimes do it. `x` (M, K) in
    the layer's 16-bit dtype.
    """
    precision = solution.plan.precision
    codes, scales = quantize_activation(x / solution.smooth, precision)
    groups = codes.double().unflatten(-1, (-1, precision.group))
    activation = (groups * scales.double().unsqueeze(-1)).flatten(-2)
    y = activation @ w4a4_weight(solution).double().T
    if solution.outer is not None:
        y = y * solution.outer.double()
    y = y + (x.double() @ solution.down.double().T) @ solution.up.double().T
    return y if solution.bias is None else y + solution.bias.double()


def w4a16_float64(x: Tensor, solution: W4A16Solution) -> Tensor:
    """The layer's contract value in float64: y = x . (codes * scales + zeros)^T + bias, no weight rounded. `x` is (M,
    K), y (M, N)."""
    groups = solution.codes.double().unflatten(-1, (-1, solution.plan.group))
    weight = groups * solution.scales.double().unsqueeze(-1) + solution.zeros.double().unsqueeze(-1)
    y = x.double() @ weight.flatten(-2).T
    return y if solution.bias is None else y + solution.bias.double()


def rotated_float64(x: Tensor, solution: RotatedSolution) -> Tensor:
    """The layer's contract value in float64: y = qa(x H) . W^T + bias with the stored W in rotated coordinates.

    How an activation is rotated and rounded is part of the contract and done as the runtimes do it. `x` (M, K), y (M,
    N).
    """
    plan = solution.plan
    activation = fake_quantize_rows(rotate(x, plan.rotation), plan.activation_bits)
    y = activation.double() @ rotated_weight(solution).double().T
    return y if solution.bias is None else y + solution.bias.double()
