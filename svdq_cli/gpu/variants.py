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
# Rows of a block whose warps compute 64 rows instead of 32: what a column costs in scales and loads is spread over
# twice the numbers, and a block reads 25 % less from L2. One block fills a multiprocessor's registers. A stage of it is
# as much work as two of the others', so that fewer hide the same latency.
LARGE_BLOCK_M, LARGE_STAGES = 256, 3
# Cycles that a multiprocessor is predicted to take for one step of a block of BLOCK_M and of LARGE_BLOCK_M rows: tensor
# cores, float32 units, or instructions at ISSUE_SHARE a cycle, whichever is most (`make kernel-report`). Large
# blocks exist for these products only; elsewhere counting predicts nothing of them.
ISSUE_SHARE = 0.75  # of the slots, which loops of this kind have been seen to use
STEP_CYCLES = {
    ("int4", "sm_80"): (656, 1088),
    ("int4", "sm_86"): (659, 1069),
    ("int4", "sm_89"): (659, 1069),
    ("int4", "sm_90a"): (933, 1443),
    ("nvfp4", "sm_120a"): (512, 1024),  # equal; the large one reads less from L2, which may be what binds
    ("nvfp4", "sm_121a"): (512, 1024),
}
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
    """The rows that M is padded to a multiple of: those of a block that is not large."""
    return SMALL_BLOCK_M if m <= SMALL_BLOCK_M else BLOCK_M


def has_large_blocks(precision: Precision, kind: Architecture) -> bool:
    return (precision.name, kind.target) in STEP_CYCLES


def large_blocks_pay(
    m: int, n: int, precision: Precision, kind: Architecture, *, multiprocessors: int
) -> bool:
    """Whether large blocks of an (M, N) result are predicted to take no longer than the others. A multiprocessor
    works through its share of the blocks, and the result is there when the one with the largest share is done."""
    if m <= SMALL_BLOCK_M or not has_large_blocks(precision, kind):
        return False
    usual, large = (
        cycles * ceil_div(ceil_div(m, rows) * ceil_div(n, BLOCK_N), multiprocessors)
        for rows, cycles in zip(
            (BLOCK_M, LARGE_BLOCK_M), STEP_CYCLES[precision.name, kind.target], strict=True
        )
    )
    return large <= usual


def warp_rows(block_m: int) -> int:
    """Rows that a warp of a block of `block_m` rows computes, by 64 columns (kernels/gemm_tile.cuh)."""
    return 64 if block_m == LARGE_BLOCK_M else 32


def gemm_threads(block_m: int) -> int:
    return block_m // warp_rows(block_m) * (BLOCK_N // 64) * LANES


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
    tile = {"BLOCK_M": block_m, "BLOCK_N": BLOCK_N, "WARP_M": warp_rows(block_m)}
    ring = {"STAGES": LARGE_STAGES if block_m == LARGE_BLOCK_M else STAGES, "MIN_BLOCKS": 1}
    if isinstance(precision, NvFp4):
        return {**tile, "PRECISION_NVFP4": 1, "BLOCK_SCALED": kind.block_scaled, **ring}
    codes = {"PRECISION_NVFP4": 0, "CODES_UNSIGNED": unsigned, "CODE_MMA": kind.code_mma}
    if block_m == BLOCK_M and (kind.code_mma, kind.target) in TWO_BLOCKS[kernel]:
        stages = TWO_BLOCKS_STAGES.get(kind.target, STAGES)
        ring = {"STAGES": stages, "MIN_BLOCKS": 2}
    return {**tile, **codes, **ring}


def variant_of(kernel: str, dtype: torch.dtype, **defines: int) -> Variant:
    """A kernel with its constants, in a 16-bit dtype."""
    constants = {"ELEMENT_BF16": dtype == torch.bfloat16, **defines}
    return Variant(kernel, tuple((name, int(value)) for name, value in constants.items()))
