"""A solution's tensors as the kernels read them: packed once when a model is loaded, unpacked to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from svdq_cli.gpu.variants import BLOCK_N
from svdq_cli.pack.kernel_tiles import (
    STEP,
    pack_column_micro_scales,
    pack_column_scales,
    pack_down_fragments,
    pack_up_fragments,
    pack_w4a16_weight,
    pack_weight_codes,
    unpack_column_micro_scales,
    unpack_column_scales,
    unpack_down_fragments,
    unpack_up_fragments,
    unpack_w4a16_weight,
    unpack_weight_codes,
)
from svdq_cli.pack.padding import crop, pad, pad_rows
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
from svdq_cli.runtime.linear import NO_ROTATION, RunningBranch
from svdq_cli.runtime.ops.records import InputOperands, Product

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RANK_TILE = 16
ROW_TILE = 8  # of N: a row of the result is stored 8 numbers at a time
# Smoothing factors are applied as float32 reciprocals: outside this range one would overflow or lose bits.
SMOOTH_RANGE = (2.0**-100, 2.0**100)


@dataclass(frozen=True, slots=True, eq=False)
class W4A4Operands:
    """A W4A4 layer. Shapes: `pack.kernel_tiles`, with N padded to whole blocks and R to 16."""

    inverse_smooth: Tensor  # (K,) float32
    down: Tensor
    weight: Tensor
    weight_scales: Tensor
    up: Tensor
    outer: Tensor | None  # (NP,) float32, nvfp4 only
    bias: Tensor | None  # (NP,) 16-bit

    @property
    def product(self) -> Product:
        """What the GEMM reads."""
        return Product(self.weight, self.weight_scales, self.up, self.outer, self.bias)

    @property
    def input(self) -> InputOperands:
        """What the first kernel reads."""
        return InputOperands(self.inverse_smooth, self.down)


@dataclass(frozen=True, slots=True, eq=False)
class W4A16Operands:
    """A W4A16 layer."""

    weight: Tensor
    scales: Tensor  # (K/64, NP, 2) 16-bit: scale and zero
    bias: Tensor | None


def unsupported_reason(solution: LayerSolution) -> str | None:
    """Why the kernels can't run a layer, or None."""
    if isinstance(solution, RotatedSolution):
        return NO_ROTATION
    n, k = solution.codes.shape
    if k % STEP:
        return f"in_features {k} is not a multiple of {STEP}"
    if n % ROW_TILE:
        return f"out_features {n} is not a multiple of {ROW_TILE}"
    if isinstance(solution, W4A4Solution):
        low, high = SMOOTH_RANGE
        smooth = solution.smooth.float()
        if not bool(((smooth >= low) & (smooth <= high)).all()):
            return f"a smoothing factor is outside {low:.0e} .. {high:.0e}"
    return None


def pack_w4a4(solution: W4A4Solution) -> W4A4Operands:
    """ValueError where `unsupported_reason` has one."""
    if reason := unsupported_reason(solution):
        raise ValueError(f"{solution.plan.name}: {reason}")
    match solution.plan.precision:
        case Int4():
            scales, outer = pack_column_scales(pad_rows(solution.scales, multiple=BLOCK_N)), None
        case NvFp4():
            bits = pad_rows(solution.scales.view(torch.uint8), multiple=BLOCK_N).view(solution.scales.dtype)
            assert solution.outer is not None
            every = solution.outer.float().expand(solution.codes.shape[0])
            scales, outer = pack_column_micro_scales(bits), pad_rows(every, multiple=BLOCK_N)
    down, up = pack_branch(solution.down, solution.up)
    return W4A4Operands(
        inverse_smooth=1 / solution.smooth.float(),
        down=down,
        weight=pack_weight_codes(pad_rows(solution.codes, multiple=BLOCK_N)),
        weight_scales=scales,
        up=up,
        outer=outer,
        bias=None if solution.bias is None else pad_rows(solution.bias, multiple=BLOCK_N),
    )


def pack_branch(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A low-rank branch, (R, K) and (N, R), as fragments; its rank padded to whole tiles."""
    return (
        pack_down_fragments(pad(down, multiples=(RANK_TILE, 1), fill=0)),
        pack_up_fragments(pad(up, multiples=(BLOCK_N, RANK_TILE), fill=0)),
    )


def pack_running(branch: RunningBranch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Another branch of a layer and its bias, (N,) padded to whole blocks."""
    bias = None if branch.bias is None else pad_rows(branch.bias, multiple=BLOCK_N)
    return (*pack_branch(branch.down, branch.up), bias)


def unpack_w4a4(operands: W4A4Operands, plan: W4A4Plan) -> W4A4Solution:
    """The inverse of `pack_w4a4`; an outer scale that is the same for all rows comes back as (1,)."""
    n, dtype = plan.linear.out_features, operands.up.dtype
    codes = unpack_weight_codes(operands.weight)[:n].view(torch.int8)
    match plan.precision:
        case Int4():
            codes = (codes << 4) >> 4  # the arithmetic shift brings the sign back
            scales, outer = unpack_column_scales(operands.weight_scales)[:n], None
        case NvFp4():
            scales = unpack_column_micro_scales(operands.weight_scales)[:n]
            assert operands.outer is not None
            outer = operands.outer[:n].to(dtype)
            outer = outer[:1] if bool((outer == outer[0]).all()) else outer
    branch = unpack_branch(operands, plan)
    return W4A4Solution(
        plan=plan,
        smooth=(1 / operands.inverse_smooth).to(dtype),
        down=branch.down,
        up=branch.up,
        codes=codes.contiguous(),
        scales=scales.contiguous(),
        outer=outer,
        bias=branch.bias,
    )


class HasBranch(Protocol):
    """A layer's operands on any of the CUDA kernels."""

    @property
    def down(self) -> Tensor:
        """(R, K) in the layer's own order."""
        ...

    @property
    def up(self) -> Tensor:
        """(N, R) in the layer's own order."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """(N,)."""
        ...


def unpack_branch(
    operands: HasBranch, plan: W4A4Plan, *, rows: Callable[[Tensor], Tensor] = unpack_up_fragments
) -> RunningBranch:
    """A layer's branch, (R, K) and (N, R), and its bias (N,). `rows`: how `up` is unpacked."""
    n = plan.linear.out_features
    return RunningBranch(
        down=unpack_down_fragments(operands.down)[: plan.rank],
        up=crop(rows(operands.up), shape=(n, plan.rank)).contiguous(),
        bias=None if operands.bias is None else operands.bias[:n],
    )


def pack_w4a16(solution: W4A16Solution) -> W4A16Operands:
    """ValueError where `unsupported_reason` has one."""
    if reason := unsupported_reason(solution):
        raise ValueError(f"{solution.plan.name}: {reason}")
    pairs = torch.stack((solution.scales, solution.zeros), -1)
    return W4A16Operands(
        weight=pack_w4a16_weight(pad_rows(solution.codes, multiple=BLOCK_N)),
        scales=pad_rows(pairs, multiple=BLOCK_N).transpose(0, 1).contiguous(),
        bias=None if solution.bias is None else pad_rows(solution.bias, multiple=BLOCK_N),
    )


def unpack_w4a16(operands: W4A16Operands, plan: W4A16Plan) -> W4A16Solution:
    """The inverse of `pack_w4a16`."""
    n = plan.linear.out_features
    pairs = operands.scales[:, :n].transpose(0, 1)
    return W4A16Solution(
        plan=plan,
        codes=unpack_w4a16_weight(operands.weight)[:n].contiguous(),
        scales=pairs[..., 0].contiguous(),
        zeros=pairs[..., 1].contiguous(),
        bias=None if operands.bias is None else operands.bias[:n],
    )


def tensors_of(operands: DataclassInstance) -> dict[str, Tensor | None]:
    """Tensors by field name, in the order of the operators' parameters."""
    return {field.name: getattr(operands, field.name) for field in fields(operands)}


def product_tensors(operands: DataclassInstance) -> dict[str, Tensor | None]:
    """Tensors that the second of a W4A4 layer's two kernels reads, by field name."""
    tensors = tensors_of(operands)
    return {name: tensor for name, tensor in tensors.items() if name not in ("inverse_smooth", "down")}
