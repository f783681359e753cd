"""What Hopper's own kernels compute, in plain torch: one function for each, as `runtime.ops` has them for the others.

Mode EXACT is the kernels' arithmetic to the bit where sums have an order. In the other modes the tensor core adds 32
products at a time in about 14 bits; the references add exactly there, and differ by about 1e-4 of the largest product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operations import (
    STAGE_GROUPS,
    STEP,
    HopperProduct,
    padded_tokens,
    token_tile,
)
from svdq_cli.experimental.hopper.tiles import (
    pack_rows,
    pack_token_scales,
    unpack_feature_scales,
    unpack_rows,
    unpack_signed_codes,
    unpack_token_scales,
)
from svdq_cli.pack.padding import pad
from svdq_cli.records import Int4
from svdq_cli.runtime.ops.arithmetic import grouped_product, hidden_rows
from svdq_cli.runtime.ops.records import InputOperands, Quantized
from svdq_cli.solve.quantizers import E4M3_MAX, quantize_activation

CODE_UNIT = 2.0**-9  # what a weight's code is worth as an e4m3 number, but in mode FP8


def quantize_down(
    x: Tensor,
    inverse_smooth: Tensor,
    down: Tensor,
    *,
    mode: HopperMode,
    unsigned: bool = False,
    shift: float = 0.0,
    n: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` (M, K) 16-bit -> packed codes, token scales and hidden, with rows of zeros added to `x` up to whole tiles."""
    m = x.shape[0]
    rows = pad(x, multiples=(padded_tokens(m, n, mode) or 1, 1), fill=0)
    codes, scales = quantize_rows(rows, inverse_smooth, mode=mode, unsigned=unsigned, shift=shift)
    return _packed(codes, scales, hidden_rows(rows, down), mode=mode, tile=token_tile(m, n, mode))


def _packed(
    codes: Tensor, scales: Tensor, hidden: Tensor, *, mode: HopperMode, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    stored = pack_token_scales(scales * _token_unit(mode), tile=tile)
    if mode != HopperMode.EXACT:
        stored = stored[:, 0]
    return pack_rows(codes.view(torch.uint8), tile=tile), stored.contiguous(), pack_rows(hidden, tile=tile)


def _token_unit(mode: HopperMode) -> float:
    return 1.0 if mode == HopperMode.FP8 else 1 / CODE_UNIT


def quantize_rows(
    rows: Tensor, inverse_smooth: Tensor, *, mode: HopperMode, unsigned: bool, shift: float
) -> tuple[Tensor, Tensor]:
    """e4m3 codes (MP, K) and float32 scales (MP, K/64), or (MP, 1) for whole rows."""
    shifted = (rows.float() + shift).to(rows.dtype) if shift else rows
    smoothed = (shifted.float() * inverse_smooth).to(rows.dtype)
    if mode == HopperMode.EXACT:
        codes, scales = quantize_activation(smoothed, Int4(), unsigned=unsigned)
        return codes.to(torch.int8).float().to(torch.float8_e4m3fn), scales.to(rows.dtype).float()
    scales = smoothed.float().abs().amax(-1, keepdim=True) * (1 / E4M3_MAX)
    inverse = 1 / scales
    inverse = torch.where(inverse.isinf(), torch.zeros_like(inverse), inverse)
    return (smoothed.float() * inverse).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def gemm(
    quantized: Quantized,
    layer: HopperProduct,
    *,
    m: int,
    n: int,
    mode: HopperMode,
) -> Tensor:
    """The packed operands of one layer -> y (M, N) in the dtype of `up`."""
    codes, token_scales, hidden = quantized
    weight, weight_scales, up, bias = layer
    y = product(codes, token_scales, weight, weight_scales, mode=mode)
    y = y + F.linear(unpack_rows(hidden).float(), unpack_rows(up).float())
    if bias is not None:
        y = y + bias.float()
    return y[:m, :n].to(up.dtype)


def gelu_quantize(
    quantized: Quantized,
    layer: HopperProduct,
    following: InputOperands,
    *,
    m: int,
    next_unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, GELU by tanh, the next layer's `quantize_down`. Rows from M on are as the first layer gives them.
    Packed from (M, K) codes, (M, K/64) scales and (M, R), as `experimental.hopper.tiles` says."""
    tiles, _, _, tile, _ = quantized[0].shape
    mode = HopperMode.EXACT
    y = gemm(quantized, layer, m=tiles * tile, n=following.inverse_smooth.shape[0], mode=mode)
    a = F.gelu(y.float(), approximate="tanh").to(y.dtype)
    found = quantize_rows(a, following.inverse_smooth, mode=mode, unsigned=next_unsigned, shift=shift)
    return _packed(*found, hidden_rows(a, following.down), mode=mode, tile=tile)


def product(
    codes: Tensor, token_scales: Tensor, weight: Tensor, weight_scales: Tensor, *, mode: HopperMode
) -> Tensor:
    """(MP, NP) float32, without branch and bias."""
    rows = unpack_rows(codes).view(torch.float8_e4m3fn).float()
    if mode == HopperMode.EXACT:
        scales = unpack_token_scales(token_scales) * CODE_UNIT
        columns = unpack_signed_codes(weight).float()
        return grouped_product(rows, scales, columns, unpack_feature_scales(weight_scales).float())
    each = unpack_token_scales(token_scales[:, None])
    if mode == HopperMode.W4A8:
        ones = torch.ones(rows.shape[0], rows.shape[1] // STEP, device=rows.device, dtype=torch.float32)
        columns = unpack_signed_codes(weight).float() * CODE_UNIT
        return grouped_product(rows, ones, columns, unpack_feature_scales(weight_scales).float()) * each
    columns = unpack_rows(weight).view(torch.float8_e4m3fn).float()
    return _promoted_product(rows, columns) * (each * weight_scales)


def _promoted_product(rows: Tensor, columns: Tensor) -> Tensor:
    """Sums over a stage, added in float32. (M, K), (N, K)."""
    total = rows.new_zeros(rows.shape[0], columns.shape[0])
    for start in range(0, rows.shape[1], STAGE_GROUPS * STEP):
        at = slice(start, start + STAGE_GROUPS * STEP)
        total = total + F.linear(rows[:, at], columns[:, at])
    return total
