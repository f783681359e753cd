"""`w4a4_gemm`, GELU by tanh and the next layer's `quantize_down`, without writing the activation."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.cpu import engine
from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher, gemm_rows, new_quantized
from svdq_cli.gpu.variants import gemm_constants, variant_of
from svdq_cli.pack.kernel_tiles import pack_hidden_fragments
from svdq_cli.pack.padding import ceil_div
from svdq_cli.records import Precision
from svdq_cli.runtime.ops import reduce_hidden, w4a4_gemm
from svdq_cli.runtime.ops.arithmetic import hidden_rows, quantize_rows
from svdq_cli.runtime.ops.define import define, define_cpu
from svdq_cli.runtime.ops.records import LAYER, InputOperands, Product, Quantized, layer_records, sizes_of


@functools.cache
def variant(
    dtype: torch.dtype,
    precision: Precision,
    kind: Architecture,
    *,
    block_m: int,
    unsigned: bool = False,
    next_unsigned: bool = False,
) -> Variant:
    kernel = "w4a4_gelu_quantize"
    constants = gemm_constants(kernel, precision, kind, block_m, unsigned)
    return variant_of(kernel, dtype, **constants, QUANTIZED_UNSIGNED=next_unsigned)


def launch(
    launcher: Launcher,
    quantized: Quantized,
    product: Product,
    following: InputOperands,
    *,
    m: int,
    precision: Precision,
    unsigned: bool = False,
    next_unsigned: bool = False,
    shift: float = 0.0,
    block_m: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels/w4a4_gelu_quantize.cu. Returns the next layer's packed codes, scales and hidden, of (M, N) numbers.
    `block_m`: as `w4a4_gemm.launch` has it."""
    mp, np, k, rank = sizes_of(quantized, product)
    up, n, next_rank = product.up, following.inverse_smooth.shape[0], 8 * following.down.shape[1]
    next_codes, next_scales, next_hidden = new_quantized(up, mp, n, next_rank, precision)
    if m == 0:
        return next_codes, next_scales, next_hidden
    partial = up.new_empty(np // variants.BLOCK_N, mp, next_rank, dtype=torch.float32)
    block_m = block_m or gemm_rows(launcher, m, n, precision)
    launcher.launch(
        variant(
            up.dtype,
            precision,
            launcher.architecture,
            block_m=block_m,
            unsigned=unsigned,
            next_unsigned=next_unsigned,
        ),
        (ceil_div(mp, block_m), np // variants.BLOCK_N, 1),
        variants.gemm_threads(block_m),
        *(*quantized, *product, *following),
        *(next_codes, next_scales, partial),
        *(shift, mp, n, np, k, rank, next_rank),
    )
    if next_rank:
        reduce_hidden.launch(launcher, partial, next_hidden)
    return next_codes, next_scales, next_hidden


def reference(
    quantized: Quantized,
    product: Product,
    following: InputOperands,
    *,
    m: int,
    precision: Precision,
    unsigned: bool = False,
    next_unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, GELU by tanh, the next layer's `quantize_down`. Rows from M on are as the first layer gives
    them. Returns packed codes, scales and hidden, of (M, N) numbers."""
    rows, columns = quantized[0].shape[1] * 16, following.inverse_smooth.shape[0]
    y = w4a4_gemm.reference(
        quantized,
        product,
        m=rows,
        n=columns,
        precision=precision,
        unsigned=unsigned,
    )
    a = F.gelu(y.float(), approximate="tanh").to(y.dtype)
    found = quantize_rows(
        a, following.inverse_smooth, precision=precision, unsigned=next_unsigned, shift=shift
    )
    return (*found, pack_hidden_fragments(hidden_rows(a, following.down)))


def _shapes(
    quantized: Quantized, product: Product, following: InputOperands, *, precision: Precision, **_: Any
) -> Quantized:
    mp, n = 16 * quantized[0].shape[1], following.inverse_smooth.shape[0]
    return new_quantized(product.up, mp, n, 8 * following.down.shape[1], precision)


define(
    "w4a4_gelu_quantize",
    f"{LAYER}, Tensor next_inverse_smooth, Tensor next_down, *, SymInt m, str precision, bool unsigned=False, "
    "bool next_unsigned=False, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    launch=launch,
    reference=reference,
    shapes=_shapes,
    gather=lambda tensors: (*layer_records(tensors), InputOperands(*tensors[8:])),
)


def _cpu_shapes(*tensors: Any, m: int, precision: Precision, **_: Any) -> Quantized:
    up, smooth, down = tensors[5], tensors[8], tensors[9]
    return engine.new_quantized(m, smooth.shape[0], down.shape[1], up.dtype, precision)


define_cpu(
    "w4a4_gelu_quantize",
    f"{LAYER}, Tensor next_smooth, Tensor next_down, Tensor? before=None, *, SymInt m, SymInt k, str precision, "
    "int? next_unsigned_from=None, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    shapes=_cpu_shapes,
)
