"""Compile-time constants of every kernel: the one place where tile sizes are chosen."""

from __future__ import annotations

import torch

from svdq_cli.gpu.architectures import CodeMma
from svdq_cli.gpu.compile import Variant
from svdq_cli.records import NvFp4, Precision

LANES = 32
QUANTIZE_WARPS, QUANTIZE_ROWS, MOST_RANK_CHUNK = 8, 32, 64
REDUCE_WARPS = 4
W4A16_WARPS, W4A16_COLUMNS = 8, 32
BLOCK_N = 128
BLOCK_M, SMALL_BLOCK_M = 128, 32  # the small one where a large block would be mostly padding
STAGES = 4


def block_rows(m: int) -> int:
    """BLOCK_M for M rows."""
    return SMALL_BLOCK_M if m <= SMALL_BLOCK_M else BLOCK_M


def gemm_threads(block_m: int) -> int:
    """A warp computes 32 rows by 64 columns (kernels/gemm_tile.cuh)."""
    return block_m // 32 * (BLOCK_N // 64) * LANES


def rank_chunk(rank: int) -> int:
    """How many ranks a block of quantize_down takes: as even a share as multiples of 16 allow, at most 64."""
    if rank == 0:
        return 0
    chunks = -(-rank // MOST_RANK_CHUNK)
    return -(-rank // (16 * chunks)) * 16


def quantize_down(dtype: torch.dtype, precision: Precision, *, rank: int, unsigned: bool = False) -> Variant:
    return _variant(
        "quantize_down",
        dtype,
        PRECISION_NVFP4=isinstance(precision, NvFp4),
        QUANTIZED_UNSIGNED=unsigned,
        RANK_CHUNK=rank_chunk(rank),
        WARPS=QUANTIZE_WARPS,
    )


def reduce_hidden(dtype: torch.dtype) -> Variant:
    return _variant("reduce_hidden", dtype, WARPS=REDUCE_WARPS)


def w4a4_gemm(
    dtype: torch.dtype,
    precision: Precision,
    *,
    block_m: int,
    code_mma: CodeMma,
    unsigned: bool = False,
    block_scaled: bool = False,
) -> Variant:
    return _variant(
        "w4a4_gemm",
        dtype,
        **_product(precision, code_mma, unsigned, block_scaled),
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
    )


def w4a4_gelu_quantize(
    dtype: torch.dtype,
    precision: Precision,
    *,
    block_m: int,
    code_mma: CodeMma,
    unsigned: bool = False,
    next_unsigned: bool = False,
    block_scaled: bool = False,
) -> Variant:
    return _variant(
        "w4a4_gelu_quantize",
        dtype,
        **_product(precision, code_mma, unsigned, block_scaled),
        QUANTIZED_UNSIGNED=next_unsigned,
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
    )


def w4a16_linear(dtype: torch.dtype) -> Variant:
    return _variant("w4a16_linear", dtype, COLUMNS=W4A16_COLUMNS, WARPS=W4A16_WARPS)


def _product(precision: Precision, code_mma: CodeMma, unsigned: bool, block_scaled: bool) -> dict[str, int]:
    if isinstance(precision, NvFp4):
        return {"PRECISION_NVFP4": 1, "BLOCK_SCALED": int(block_scaled)}
    return {"PRECISION_NVFP4": 0, "CODES_UNSIGNED": int(unsigned), "CODE_MMA": int(code_mma)}


def _variant(kernel: str, dtype: torch.dtype, **defines: int) -> Variant:
    constants = {"ELEMENT_BF16": dtype == torch.bfloat16, **defines}
    return Variant(kernel, tuple((name, int(value)) for name, value in constants.items()))
