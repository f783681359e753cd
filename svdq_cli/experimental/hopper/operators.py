"""Hopper's own kernels as torch operators, `torch.ops.svdq.hopper_*`: on a GPU the kernel, on a CPU its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from svdq_cli.experimental.hopper import operations, reference
from svdq_cli.experimental.hopper.modes import HopperMode, hopper_mode
from svdq_cli.experimental.hopper.operations import HopperProduct
from svdq_cli.runtime.ops.define import define
from svdq_cli.runtime.ops.records import InputOperands, Quantized


def _quantized_shapes(
    x: Tensor, inverse_smooth: Tensor, down: Tensor, *, mode: HopperMode, n: int = 0, **_: Any
):
    (m, k), rank = x.shape, 8 * down.shape[1]
    return operations.new_quantized(
        *(x, operations.padded_tokens(m, n, mode), k, rank),
        mode=mode,
        tokens=operations.token_tile(m, n, mode),
    )


def _layer_records(tensors: Sequence[Tensor]) -> tuple[Quantized, HopperProduct]:
    """The records of an operator's first seven parameters, those of `_LAYER`. Packed from (M, K) codes, (N, K)
    weights."""
    codes, scales, hidden, *product = tensors[:7]
    return (codes, scales, hidden), HopperProduct(*product)


def _product_shape(quantized: Quantized, product: HopperProduct, *, m: int, n: int, **_: Any):
    return product.up.new_empty(m, n)


def _fused_shapes(quantized: Quantized, product: HopperProduct, following: InputOperands, **_: Any):
    tiles, tokens = quantized[0].shape[0], quantized[0].shape[3]
    n, rank = following.inverse_smooth.shape[0], 8 * following.down.shape[1]
    return operations.new_quantized(product.up, tiles * tokens, n, rank, mode=HopperMode.EXACT, tokens=tokens)


_LAYER = (
    "Tensor codes, Tensor token_scales, Tensor hidden, Tensor weight, Tensor weight_scales, Tensor up, "
    "Tensor? bias"
)
define(
    "hopper_quantize_down",
    "Tensor x, Tensor inverse_smooth, Tensor down, *, str mode, bool unsigned=False, "
    "float shift=0.0, int n=0",
    "(Tensor, Tensor, Tensor)",
    launch=operations.quantize_down,
    reference=reference.quantize_down,
    shapes=_quantized_shapes,
    records={"mode": hopper_mode},
)
define(
    "hopper_gemm",
    f"{_LAYER}, *, SymInt m, SymInt n, str mode",
    "Tensor",
    launch=operations.gemm,
    reference=reference.gemm,
    shapes=_product_shape,
    gather=_layer_records,
    records={"mode": hopper_mode},
)
define(
    "hopper_gelu_quantize",
    f"{_LAYER}, Tensor next_inverse_smooth, Tensor next_down, *, SymInt m, bool next_unsigned=False, "
    "float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    launch=operations.gelu_quantize,
    reference=reference.gelu_quantize,
    shapes=_fused_shapes,
    gather=lambda tensors: (*_layer_records(tensors), InputOperands(*tensors[7:])),
)
