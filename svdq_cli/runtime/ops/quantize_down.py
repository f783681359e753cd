"""The first kernel of a W4A4 layer: smooth, quantize and project down, in one read of the input."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from svdq_cli.cpu import engine
from svdq_cli.gpu import variants
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher, aligned, new_quantized, padded_rows, splits_of
from svdq_cli.gpu.variants import variant_of
from svdq_cli.pack.kernel_tiles import pack_hidden_fragments
from svdq_cli.pack.padding import ceil_div, pad
from svdq_cli.records import NvFp4, Precision
from svdq_cli.runtime.ops import reduce_hidden
from svdq_cli.runtime.ops.arithmetic import hidden_rows, quantize_rows
from svdq_cli.runtime.ops.define import define, define_cpu
from svdq_cli.runtime.ops.records import Quantized


@functools.cache
def variant(dtype: torch.dtype, precision: Precision, *, rank: int, unsigned: bool = False) -> Variant:
    return variant_of(
        "quantize_down",
        dtype,
        PRECISION_NVFP4=isinstance(precision, NvFp4),
        QUANTIZED_UNSIGNED=unsigned,
        RANK_CHUNK=variants.rank_chunk(rank),
        WARPS=variants.QUANTIZE_WARPS,
    )


def launch(
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
    chunks = ceil_div(rank, chunk) if rank else 1
    splits = splits_of(launcher, mp // variants.QUANTIZE_ROWS * chunks, k) if rank else 1
    partial = x.new_empty(splits, mp, rank, dtype=torch.float32) if splits > 1 else None
    launcher.launch(
        variant(x.dtype, precision, rank=rank, unsigned=unsigned),
        (mp // variants.QUANTIZE_ROWS, chunks, splits),
        variants.QUANTIZE_WARPS * variants.LANES,
        *(x, inverse_smooth, down, codes, scales, hidden, partial, shift, m, mp, k, rank),
    )
    if partial is not None:
        reduce_hidden.launch(launcher, partial, hidden)
    return codes, scales, hidden


def reference(
    x: Tensor,
    inverse_smooth: Tensor,
    down: Tensor,
    *,
    precision: Precision,
    unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` (M, K) 16-bit -> packed codes, scales and hidden, with rows of zeros added to `x` up to whole blocks."""
    rows = pad(x, multiples=(padded_rows(x.shape[0]), 1), fill=0)
    codes, scales = quantize_rows(rows, inverse_smooth, precision=precision, unsigned=unsigned, shift=shift)
    return codes, scales, pack_hidden_fragments(hidden_rows(rows, down))


def _shapes(x: Tensor, inverse_smooth: Tensor, down: Tensor, *, precision: Precision, **_: Any):
    (m, k), rank = x.shape, 8 * down.shape[1]
    return new_quantized(x, padded_rows(m), k, rank, precision)


define(
    "quantize_down",
    "Tensor x, Tensor inverse_smooth, Tensor down, *, str precision, bool unsigned=False, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    launch=launch,
    reference=reference,
    shapes=_shapes,
)


def _cpu_shapes(x: Tensor, smooth: Tensor, down: Tensor, *, precision: Precision, **_: Any) -> Quantized:
    m, k = x.shape
    return engine.new_quantized(m, k, down.shape[1], smooth.dtype, precision)


define_cpu(
    "quantize_down",
    "Tensor x, Tensor smooth, Tensor down, *, str precision, int? unsigned_from=None, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    shapes=_cpu_shapes,
)
