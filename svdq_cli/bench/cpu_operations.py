"""A converted layer on the CPU engine: whole, without its branch, with an unfused branch, and its first half."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.bench.baselines import Make, int8_mm, weight_only_int4_on_cpu
from svdq_cli.bench.ggml import ggml_product, ggml_products
from svdq_cli.bench.operations import NAMES, Operation, w4a4_float64, w4a16_float64, without_branch
from svdq_cli.bench.report import FUSED, NO_BRANCH, UNFUSED
from svdq_cli.pack.cpu_panels import unpack_hidden
from svdq_cli.records import Int4, LayerSolution, W4A4Solution, W4A16Solution
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear, CpuW4A16Linear, cpu_linear
from svdq_cli.runtime.ops.records import Quantized

LINEAR, QUANTIZE = "linear", "quantize and down"


def cpu_operations(solution: LayerSolution, m: int) -> Iterator[tuple[Operation, ...]]:
    """Operations, those together that are to take turns. `m`: rows of the input that will be measured."""
    match solution:
        case W4A4Solution():
            fused = _w4a4(FUSED, solution, cpu_linear(solution))
            if solution.up.shape[1] == 0:
                yield (fused,)
                return
            bare = without_branch(solution)
            unfused = UnfusedBranch(CpuW4A4Linear(bare), solution)
            yield fused, _w4a4(NO_BRANCH, bare, cpu_linear(bare)), _w4a4(UNFUSED, solution, unfused)
            yield (_quantize(solution, m),)
        case W4A16Solution():
            yield (_modulation(solution),)


def cpu_baselines(m: int) -> Iterator[tuple[str, Make]]:
    """What torch itself offers next to its float linears, for M rows, by name."""
    yield "torch._weight_int4pack_mm_for_cpu", weight_only_int4_on_cpu
    if m > 1:
        yield "torch._int_mm", int8_mm
        for name, kind, repacked in ggml_products():
            yield name, partial(ggml_product, kind=kind, repacked=repacked)


class UnfusedBranch(nn.Module):
    """The layer without its branch, and the branch as three separate torch operations: shows what fusing saves."""

    def __init__(self, bare: CpuW4A4Linear, solution: W4A4Solution) -> None:
        super().__init__()
        self.bare = bare
        self.register_buffer("down", solution.down)
        self.register_buffer("up", solution.up)

    def forward(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N)."""
        return self.bare(x) + F.linear(F.linear(x, self.get_buffer("down")), self.get_buffer("up"))


class Quantize(nn.Module):
    """Codes, scales and the hidden vector of the branch."""

    def __init__(self, layer: CpuW4A4Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Quantized:
        """`x` is (M, K)."""
        return self.layer.quantize(x)


def _w4a4(mode: str, solution: W4A4Solution, module: nn.Module) -> Operation:
    dtype = solution.up.dtype
    group = solution.plan.precision.group
    return Operation(
        LINEAR,
        mode,
        solution.plan.precision.name,
        solution.up.shape[1],
        dtype,
        module,
        lambda x: w4a4_float64(x, solution),
        f"exact integers in each group of {group}, one float32 fma a group; result rounded to {NAMES[dtype]}",
    )


def _quantize(solution: W4A4Solution, m: int) -> Operation:
    layer, dtype = CpuW4A4Linear(solution), solution.up.dtype
    k, rank, precision = layer.in_features, solution.up.shape[1], solution.plan.precision
    scale_bytes = 8 * m * k // precision.group
    return Operation(
        QUANTIZE,
        FUSED,
        precision.name,
        rank,
        dtype,
        Quantize(layer),
        lambda x: x.double() @ solution.down.double().T,
        f"codes and scales to the bit; one float32 chain; hidden vector rounded to {NAMES[dtype]}",
        rows_of=lambda quantized: unpack_hidden(quantized[2])[:m, :rank],
        least_bytes=3 * m * k + scale_bytes + 2 * rank * (m + k) if isinstance(precision, Int4) else None,
    )


def _modulation(solution: W4A16Solution) -> Operation:
    layer, dtype = CpuW4A16Linear(solution), solution.scales.dtype
    return Operation(
        LINEAR,
        FUSED,
        "w4a16 int4",
        None,
        dtype,
        layer,
        lambda x: w4a16_float64(x, solution),
        f"one float32 chain; weight and result rounded to {NAMES[dtype]}",
        least_bytes=sum(tensor.nbytes for tensor in layer.buffers()),
    )
