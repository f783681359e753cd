"""The kernels' arithmetic in plain torch, as far as several of them share it.

Operands and results are packed as the kernels have them (`pack.kernel_tiles`), so that a reference can stand in for
its kernel. The arithmetic is the kernels' to the bit where their sums have an order: everything but 16-bit and e2m1
products, which tensor cores sum in an order of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.pack.kernel_tiles import (
    STEP,
    pack_row_codes,
    pack_row_micro_scales,
    pack_row_scales,
    unpack_column_micro_scales,
    unpack_column_scales,
    unpack_down_fragments,
    unpack_row_codes,
    unpack_row_micro_scales,
    unpack_row_scales,
    unpack_weight_codes,
)
from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.quantizers import decode_e2m1, quantize_activation


def quantize_rows(
    x: Tensor, inverse_smooth: Tensor, *, precision: Precision, unsigned: bool, shift: float
) -> tuple[Tensor, Tensor]:
    """(x + shift) / smooth as packed codes and scales. `x` (MP, K) 16-bit."""
    shifted = (x.float() + shift).to(x.dtype) if shift else x
    smoothed = (shifted.float() * inverse_smooth).to(x.dtype)
    codes, scales = quantize_activation(smoothed, precision, unsigned=unsigned)
    match precision:
        case Int4():
            return pack_row_codes(codes.to(torch.int8)), pack_row_scales(scales.to(x.dtype))
        case NvFp4():
            return pack_row_codes(nibbles_of(codes)), pack_row_micro_scales(scales.to(torch.float8_e4m3fn))


def hidden_rows(x: Tensor, down: Tensor) -> Tensor:
    """x . down^T, (M, R), rounded to the 16-bit dtype of `x`. `down` packed."""
    return F.linear(x.float(), unpack_down_fragments(down).float()).to(x.dtype)


def four_bit_product(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    *,
    precision: Precision,
    unsigned: bool,
) -> Tensor:
    """(MP, NP) float32, without the outer scale."""
    row_codes, column_codes = unpack_row_codes(codes), unpack_weight_codes(weight)
    match precision:
        case Int4():
            rows = row_codes.float() if unsigned else signed(row_codes)
            columns = signed(column_codes)
            return grouped_product(
                rows, unpack_row_scales(scales).float(), columns, unpack_column_scales(weight_scales).float()
            )
        case NvFp4():
            rows = _scaled(decode_e2m1(row_codes), unpack_row_micro_scales(scales))
            return F.linear(
                rows, _scaled(decode_e2m1(column_codes), unpack_column_micro_scales(weight_scales))
            )


def nibbles_of(values: Tensor) -> Tensor:
    """E2M1 values as nibbles 0..15; the sign of zero stays, as the kernels keep it. Of any shape, which stays."""
    table = decode_e2m1(torch.arange(8, device=values.device))
    magnitude = torch.bucketize(values.abs(), table)
    return (magnitude + 8 * torch.signbit(values)).to(torch.uint8)


def grouped_product(rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor) -> Tensor:
    """Group sums are exact integers; each is added by one fma, groups in order. (M, K), (M, G), (N, K), (N, G)."""
    total = rows.new_zeros(rows.shape[0], columns.shape[0])
    for group in range(row_scales.shape[1]):
        at = slice(group * STEP, (group + 1) * STEP)
        sums = F.linear(rows[:, at], columns[:, at]).double()
        scale = row_scales[:, group, None] * column_scales[None, :, group]
        total = (
            sums * scale.double() + total.double()
        ).float()  # one fma, but for double rounding in 2^-29 of cases
    return total


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    return (values.unflatten(-1, (-1, NvFp4.group)) * scales.float().unsqueeze(-1)).flatten(-2)


def signed(nibbles: Tensor) -> Tensor:
    """0..15 as -8..7, float32. Of any shape, which stays."""
    return ((nibbles.view(torch.int8) << 4) >> 4).float()
