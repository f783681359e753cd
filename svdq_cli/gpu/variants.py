"""Compile-time constants that kernels share: the one place where tile sizes are chosen."""

from __future__ import annotations

import torch

from svdq_cli.gpu.architectures import Architecture, CodeMma
from svdq_cli.gpu.compile import Variant
from svdq_cli.pack.padding import ceil_div
from svdq_cli.records import NvFp4, Precision

LANES = 32
QUANTIZE_WARPS, QUANTIZE_ROWS, MOST_RANK_CHUNK = 8, 32, 64
REDUCE_WARPS = 4
W4A16_WARPS, W4A16_COLUMNS = 8, 32
BLOCK_N = 128
BLOCK_M, SMALL_BLOCK_M = 128, 32  # the small one where a large block would be mostly padding
STAGES = 4
# Two blocks of 256 threads share a multiprocessor when a thread has 128 registers. These products fit into so few
# without spills, by kernel, instruction and target; nvfp4 products don't.
_AMPERE = tuple((CodeMma.S4_K64, target) for target in ("sm_80", "sm_86", "sm_89"))
TWO_BLOCKS = {
    "w4a4_gemm": ((CodeMma.S4_K32, "sm_75"), *_AMPERE, (CodeMma.S8_K32, "sm_90a")),
    "w4a4_gelu_quantize": (*_AMPERE, (CodeMma.S8_K32, "sm_90a")),
}
TWO_BLOCKS_TARGETS = {target for products in TWO_BLOCKS.values() for _, target in products}
# Two blocks of four stages exceed Turing's 64 KB of shared memory; copies are waited for there, so that a stage more
# would hide nothing.
TWO_BLOCKS_STAGES = {"sm_75": 3}


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
    chunks = ceil_div(rank, MOST_RANK_CHUNK)
    return 16 * ceil_div(rank, 16 * chunks)


def gemm_constants(
    kernel: str, precision: Precision, kind: Architecture, block_m: int, unsigned: bool
) -> dict[str, int]:
    """Those of a kernel with a 4-bit product. `unsigned`: the activation's int4 codes are 0..15."""
    tile = {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N}
    if isinstance(precision, NvFp4):
        codes = {"PRECISION_NVFP4": 1, "BLOCK_SCALED": kind.block_scaled}
        return {**tile, **codes, "STAGES": STAGES, "MIN_BLOCKS": 1}
    codes = {"PRECISION_NVFP4": 0, "CODES_UNSIGNED": unsigned, "CODE_MMA": kind.code_mma}
    if block_m == BLOCK_M and (kind.code_mma, kind.target) in TWO_BLOCKS[kernel]:
        stages = TWO_BLOCKS_STAGES.get(kind.target, STAGES)
        return {**tile, **codes, "STAGES": stages, "MIN_BLOCKS": 2}
    return {**tile, **codes, "STAGES": STAGES, "MIN_BLOCKS": 1}


def variant_of(kernel: str, dtype: torch.dtype, **defines: int) -> Variant:
    """A kernel with its constants, in a 16-bit dtype."""
    constants = {"ELEMENT_BF16": dtype == torch.bfloat16, **defines}
    return Variant(kernel, tuple((name, int(value)) for name, value in constants.items()))
