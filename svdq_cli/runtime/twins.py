"""What the CUDA kernels compute, in plain torch: one function for each kernel, with its name, inputs and outputs.

Operands and results are packed as the kernels have them (`pack.kernel_tiles`), so a twin can stand in for its kernel.
The arithmetic is the kernels' to the bit where their sums have an order: everything but 16-bit and e2m1 products, which
tensor cores sum in an order of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.gpu.operations import padded_rows
from svdq_cli.pack.kernel_tiles import (
    STEP,
    pack_hidden_fragments,
    pack_row_codes,
    pack_row_micro_scales,
    pack_row_scales,
    unpack_column_micro_scales,
    unpack_column_scales,
    unpack_down_fragments,
    unpack_hidden_fragments,
    unpack_row_codes,
    unpack_row_micro_scales,
    unpack_row_scales,
    unpack_up_fragments,
    unpack_w4a16_weight,
    unpack_weight_codes,
)
from svdq_cli.pack.padding import pad
from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.quantizers import decode_e2m1, quantize_activation


def quantize_down(
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


def reduce_hidden(partial: Tensor) -> Tensor:
    """(splits, MP, R) float32 -> their sum, one after the other. The kernel rounds and packs it."""
    total = torch.zeros_like(partial[0])
    for part in partial:
        total = total + part
    return total


def w4a4_gemm(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    up: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    *,
    m: int,
    n: int,
    precision: Precision,
    unsigned: bool = False,
) -> Tensor:
    """The packed operands of one layer -> y (M, N) in the dtype of `up`."""
    product = four_bit_product(codes, scales, weight, weight_scales, precision=precision, unsigned=unsigned)
    if outer is not None:
        product = product * outer
    y = product + F.linear(unpack_hidden_fragments(hidden).float(), unpack_up_fragments(up).float())
    if bias is not None:
        y = y + bias.float()
    return y[:m, :n].to(up.dtype)


def w4a4_gelu_quantize(
    codes: Tensor,
    scales: Tensor,
    hidden: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    up: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    next_inverse_smooth: Tensor,
    next_down: Tensor,
    *,
    m: int,
    precision: Precision,
    unsigned: bool = False,
    next_unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, GELU by tanh, the next layer's `quantize_down`. Rows from M on are as the first layer gives them."""
    rows, columns = codes.shape[1] * 16, next_inverse_smooth.shape[0]
    y = w4a4_gemm(
        *(codes, scales, hidden, weight, weight_scales, up, outer, bias),
        m=rows,
        n=columns,
        precision=precision,
        unsigned=unsigned,
    )
    a = F.gelu(y.float(), approximate="tanh").to(y.dtype)
    quantized = quantize_rows(
        a, next_inverse_smooth, precision=precision, unsigned=next_unsigned, shift=shift
    )
    return (*quantized, pack_hidden_fragments(hidden_rows(a, next_down)))


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
            rows = row_codes.float() if unsigned else _signed(row_codes)
            columns = _signed(column_codes)
            return grouped_product(
                rows, unpack_row_scales(scales).float(), columns, unpack_column_scales(weight_scales).float()
            )
        case NvFp4():
            rows = _scaled(decode_e2m1(row_codes), unpack_row_micro_scales(scales))
            return F.linear(
                rows, _scaled(decode_e2m1(column_codes), unpack_column_micro_scales(weight_scales))
            )


def w4a16_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, n: int) -> Tensor:
    """`x` (M, K) -> (M, N). Each weight is one fma of codes, scale and zero, rounded to 16 bit."""
    groups = unpack_w4a16_weight(weight).double().unflatten(-1, (-1, STEP))
    scale, zero = scales.double().permute(2, 1, 0).unsqueeze(-1)
    values = (groups * scale + zero).flatten(-2).to(x.dtype)
    y = F.linear(x.float(), values.float())
    if bias is not None:
        y = y + bias.float()
    return y[:, :n].to(x.dtype)


def nibbles_of(values: Tensor) -> Tensor:
    """E2M1 values as nibbles 0..15; the sign of zero stays, as the kernels keep it."""
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


def _signed(nibbles: Tensor) -> Tensor:
    return ((nibbles.view(torch.int8) << 4) >> 4).float()
