"""What launches kernels, and what every launch needs to know of it and of its operands."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.pack.kernel_tiles import STEP
from svdq_cli.pack.padding import round_up
from svdq_cli.records import NvFp4, Precision

MOST_SPLITS = 8
BLOCKS_A_MULTIPROCESSOR = 2  # of quantize_down
LEAST_STEPS_A_WARP = 2  # of quantize_down, below which splitting K gains nothing

Argument = Tensor | int | float | None


class Launcher(Protocol):
    """A device that runs kernels. Tensors are passed as pointers, int as int32, float as float32, None as null."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def multiprocessors(self) -> int: ...

    @property
    def large_blocks(self) -> bool:
        """Whether the GEMM's large blocks have been proven here (gpu/verdicts.py)."""
        ...

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], threads: int, *arguments: Argument
    ) -> None: ...


def padded_rows(m: int) -> int:
    """M rounded up to whole blocks of the GEMM that will read it."""
    return round_up(m, variants.block_rows(m))


def gemm_rows(launcher: Launcher, m: int, n: int, precision: Precision) -> int:
    """Rows of a block of the GEMM for an (M, N) result: large ones where they are proven and pay."""
    kind, count = launcher.architecture, launcher.multiprocessors
    if launcher.large_blocks and variants.large_blocks_pay(m, n, precision, kind, multiprocessors=count):
        return variants.LARGE_BLOCK_M
    return variants.block_rows(m)


def new_quantized(
    like: Tensor, mp: int, k: int, rank: int, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized codes, scales and hidden of a quantized activation, on the device and in the 16-bit dtype of
    `like`. Packed from (MP, K) codes, their scales of each row and group, and (MP, R)."""
    scale_dtype = torch.int32 if isinstance(precision, NvFp4) else like.dtype
    return (
        like.new_empty(k // STEP, mp // 16, 32, 4, dtype=torch.int32),
        like.new_empty(k // STEP, mp, dtype=scale_dtype),
        like.new_empty(rank // 16, mp // 16, 32, 8),
    )


def aligned(x: Tensor) -> Tensor:
    """Kernels read the input 16 bytes at a time; a view may begin anywhere. Of any shape, which stays."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def splits_of(launcher: Launcher, blocks: int, k: int) -> int:
    """The number of parts that K is cut into, so that every multiprocessor has as many blocks to run as fit it: one
    block of eight warps can't hide the latency of its own arithmetic."""
    useful = k // STEP // (LEAST_STEPS_A_WARP * variants.QUANTIZE_WARPS)
    return max(1, min(BLOCKS_A_MULTIPROCESSOR * launcher.multiprocessors // blocks, useful, MOST_SPLITS))
