"""The second kernel of a W4A4 layer: 4-bit product, low-rank branch and bias in one pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher, gemm_rows
from svdq_cli.gpu.variants import gemm_constants, variant_of
from svdq_cli.pack.kernel_tiles import unpack_hidden_fragments, unpack_up_fragments
from svdq_cli.pack.padding import ceil_div
from svdq_cli.records import Precision
from svdq_cli.runtime.ops.arithmetic import four_bit_product
from svdq_cli.runtime.ops.define import define, define_cpu
from svdq_cli.runtime.ops.records import LAYER, Product, Quantized, layer_records, sizes_of


@functools.cache
def variant(
    dtype: torch.dtype, precision: Precision, kind: Architecture, *, block_m: int, unsigned: bool = False
) -> Variant:
    """`unsigned`: the activation's int4 codes are 0..15."""
    return variant_of("w4a4_gemm", dtype, **gemm_constants("w4a4_gemm", precision, kind, block_m, unsigned))


def launch(
    launcher: Launcher,
    quantized: Quantized,
    product: Product,
    *,
    m: int,
    n: int,
    precision: Precision,
    unsigned: bool = False,
    block_m: int | None = None,
) -> Tensor:
    """kernels/w4a4_gemm.cu. Returns y (M, N) in the layer's dtype, the same for every `block_m`: the rows of a block,
    which are chosen by M and N without one."""
    mp, np, k, rank = sizes_of(quantized, product)
    y = product.up.new_empty(m, n)
    if m == 0:
        return y
    block_m = block_m or gemm_rows(launcher, m, n, precision)
    launcher.launch(
        variant(product.up.dtype, precision, launcher.architecture, block_m=block_m, unsigned=unsigned),
        (ceil_div(mp, block_m), np // variants.BLOCK_N, 1),
        variants.gemm_threads(block_m),
        *(*quantized, *product, y, m, mp, n, np, k, rank),
    )
    return y


def reference(
    quantized: Quantized,
    product: Product,
    *,
    m: int,
    n: int,
    precision: Precision,
    unsigned: bool = False,
) -> Tensor:
    """The packed operands of one layer -> y (M, N) in the dtype of `up`."""
    codes, scales, hidden = quantized
    weight, weight_scales, up, outer, bias = product
    sums = four_bit_product(codes, scales, weight, weight_scales, precision=precision, unsigned=unsigned)
    if outer is not None:
        sums = sums * outer
    y = sums + F.linear(unpack_hidden_fragments(hidden).float(), unpack_up_fragments(up).float())
    if bias is not None:
        y = y + bias.float()
    return y[:m, :n].to(up.dtype)


def _shapes(quantized: Quantized, product: Product, *, m: int, n: int, **_: Any) -> Tensor:
    return product.up.new_empty(m, n)


define(
    "w4a4_gemm",
    f"{LAYER}, *, SymInt m, SymInt n, str precision, bool unsigned=False",
    "Tensor",
    launch=launch,
    reference=reference,
    shapes=_shapes,
    gather=layer_records,
)


def _cpu_shapes(*tensors: Any, m: int, n: int, float32: bool = False, **_: Any) -> Tensor:
    up = tensors[5]
    return up.new_empty(m, n, dtype=torch.float32 if float32 else up.dtype)


define_cpu(
    "w4a4_gemm",
    f"{LAYER}, *, SymInt m, SymInt n, SymInt k, str precision, bool float32=False",
    "Tensor",
    shapes=_cpu_shapes,
)
