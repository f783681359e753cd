"""The kernels as functions on torch tensors: allocate the results, choose variant and grid, launch.

What launches is a parameter: a GPU (`gpu.launch`), or in the tests a CPU that runs the kernels' own source.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.records import NvFp4, Precision

STEP = 64  # columns of one step of every kernel
MOST_SPLITS = 8
LEAST_STEPS_A_WARP = 2  # of quantize_down, below which splitting K gains nothing

Argument = Tensor | int | float | None


class Launcher(Protocol):
    """A device that runs kernels. Tensors are passed as pointers, int as int32, float as float32, None as null."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def multiprocessors(self) -> int: ...

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], threads: int, *arguments: Argument
    ) -> None: ...


def padded_rows(m: int) -> int:
    """M rounded up to whole blocks of the GEMM that will read it."""
    return _round_up(m, variants.block_rows(m))


def quantize_down(
    launcher: Launcher,
    x: Tensor,
    inverse_smooth: Tensor,
    down: Tensor,
    *,
    precision: Precision,
    unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels/quantize_down.cu. `x` (M, K) contiguous. Returns packed codes, scales and hidden."""
    (m, k), rank = x.shape, 8 * down.shape[1]
    mp = padded_rows(m)
    codes, scales, hidden = new_quantized(x, mp, k, rank, precision)
    if m == 0:
        return codes, scales, hidden
    x = aligned(x)
    chunk = variants.rank_chunk(rank)
    chunks = -(-rank // chunk) if rank else 1
    splits = splits_of(launcher, mp // variants.QUANTIZE_ROWS * chunks, k) if rank else 1
    partial = x.new_empty(splits, mp, rank, dtype=torch.float32) if splits > 1 else None
    launcher.launch(
        variants.quantize_down(x.dtype, precision, rank=rank, unsigned=unsigned),
        (mp // variants.QUANTIZE_ROWS, chunks, splits),
        variants.QUANTIZE_WARPS * variants.LANES,
        *(x, inverse_smooth, down, codes, scales, hidden, partial, shift, m, mp, k, rank),
    )
    if partial is not None:
        reduce_hidden(launcher, partial, hidden)
    return codes, scales, hidden


def reduce_hidden(launcher: Launcher, partial: Tensor, hidden: Tensor) -> None:
    """kernels/reduce_hidden.cu. `partial` (splits, MP, R) float32; fills `hidden`."""
    splits, mp, rank = partial.shape
    tiles = mp // 16 * (rank // 16)
    launcher.launch(
        variants.reduce_hidden(hidden.dtype),
        (-(-tiles // variants.REDUCE_WARPS), 1, 1),
        variants.REDUCE_WARPS * variants.LANES,
        *(partial, hidden, splits, mp, rank),
    )


def w4a4_gemm(
    launcher: Launcher,
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    up: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    *,
    m: int,
    n: int,
    precision: Precision,
    unsigned: bool = False,
) -> Tensor:
    """kernels/w4a4_gemm.cu. Returns y (M, N) in the dtype of `up`."""
    k, rank, mp, np = STEP * codes.shape[0], 16 * up.shape[0], 16 * codes.shape[1], 16 * weight.shape[1]
    y = up.new_empty(m, n)
    if m == 0:
        return y
    block_m = variants.block_rows(m)
    launcher.launch(
        variants.w4a4_gemm(up.dtype, precision, launcher.architecture, block_m=block_m, unsigned=unsigned),
        (mp // block_m, np // variants.BLOCK_N, 1),
        variants.gemm_threads(block_m),
        *(codes, scales, hidden, weight, weight_scales, up, outer, bias, y, m, mp, n, np, k, rank),
    )
    return y


def w4a4_gelu_quantize(
    launcher: Launcher,
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    up: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    next_inverse_smooth: Tensor,
    next_down: Tensor,
    *,
    m: int,
    precision: Precision,
    unsigned: bool = False,
    next_unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels/w4a4_gelu_quantize.cu. Returns the next layer's packed codes, scales and hidden."""
    k, rank, mp, np = STEP * codes.shape[0], 16 * up.shape[0], 16 * codes.shape[1], 16 * weight.shape[1]
    n, next_rank = next_inverse_smooth.shape[0], 8 * next_down.shape[1]
    next_codes, next_scales, next_hidden = new_quantized(up, mp, n, next_rank, precision)
    if m == 0:
        return next_codes, next_scales, next_hidden
    partial = up.new_empty(np // variants.BLOCK_N, mp, next_rank, dtype=torch.float32)
    block_m = variants.block_rows(m)
    launcher.launch(
        variants.w4a4_gelu_quantize(
            up.dtype,
            precision,
            launcher.architecture,
            block_m=block_m,
            unsigned=unsigned,
            next_unsigned=next_unsigned,
        ),
        (mp // block_m, np // variants.BLOCK_N, 1),
        variants.gemm_threads(block_m),
        *(codes, scales, hidden, weight, weight_scales, up, outer, bias),
        *(next_inverse_smooth, next_down, next_codes, next_scales, partial),
        *(shift, mp, n, np, k, rank, next_rank),
    )
    if next_rank:
        reduce_hidden(launcher, partial, next_hidden)
    return next_codes, next_scales, next_hidden


def w4a16_linear(
    launcher: Launcher, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, n: int
) -> Tensor:
    """kernels/w4a16_linear.cu. `x` (M, K) contiguous; returns y (M, N)."""
    m, k = x.shape
    np = 16 * weight.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    launcher.launch(
        variants.w4a16_linear(x.dtype),
        (np // variants.W4A16_COLUMNS, -(-m // 16), 1),
        variants.W4A16_WARPS * variants.LANES,
        *(aligned(x), weight, scales, bias, y, m, n, np, k),
    )
    return y


def new_quantized(
    like: Tensor, mp: int, k: int, rank: int, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty codes, scales and hidden of a quantized activation, on the device and in the 16-bit dtype of `like`."""
    scale_dtype = torch.int32 if isinstance(precision, NvFp4) else like.dtype
    return (
        like.new_empty(k // STEP, mp // 16, 32, 4, dtype=torch.int32),
        like.new_empty(k // STEP, mp, dtype=scale_dtype),
        like.new_empty(rank // 16, mp // 16, 32, 8),
    )


def aligned(x: Tensor) -> Tensor:
    """Kernels read the input 16 bytes at a time; a view may begin anywhere."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def splits_of(launcher: Launcher, blocks: int, k: int) -> int:
    """Into how many parts K is cut, so that every multiprocessor has a block to run."""
    useful = k // STEP // (LEAST_STEPS_A_WARP * variants.QUANTIZE_WARPS)
    return max(1, min(launcher.multiprocessors // blocks, useful, MOST_SPLITS))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
