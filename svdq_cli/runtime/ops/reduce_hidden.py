"""Adds partial hidden vectors in a fixed order. No operator: other kernels' launches end with it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from svdq_cli.gpu import variants
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher
from svdq_cli.gpu.variants import variant_of
from svdq_cli.pack.padding import ceil_div


@functools.cache
def variant(dtype: torch.dtype) -> Variant:
    return variant_of("reduce_hidden", dtype, WARPS=variants.REDUCE_WARPS)


def launch(launcher: Launcher, partial: Tensor, hidden: Tensor) -> None:
    """kernels/reduce_hidden.cu. `partial` (splits, MP, R) float32; fills `hidden`."""
    splits, mp, rank = partial.shape
    tiles = mp // 16 * (rank // 16)
    launcher.launch(
        variant(hidden.dtype),
        (ceil_div(tiles, variants.REDUCE_WARPS), 1, 1),
        variants.REDUCE_WARPS * variants.LANES,
        *(partial, hidden, splits, mp, rank),
    )


def reference(partial: Tensor) -> Tensor:
    """(splits, MP, R) float32 -> their sum, one after the other. The kernel rounds and packs it."""
    total = torch.zeros_like(partial[0])
    for part in partial:
        total = total + part
    return total
