"""The 4-bit weight codes of W4A4 layers, as tensor-core fragments (Nunchaku weight layout).

The matrix is cut into tiles of 128 rows by 64 columns. One thread of a warp reads four 32-bit words of a
tile at once; each word holds the eight neighboring codes of one row that its `mma` fragment wants. So the
declared shape (N, K/2) is only a label: a tile is contiguous, a row is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.tiles import Layout, join_nibbles, require_shape, signed_nibbles, split_nibbles
from svdq_cli.records import Int4, NvFp4, Precision


def pack_codes(codes: Tensor, precision: Precision) -> Tensor:
    """(N, K) integers -> (N, K/2) int8. N % 128 == 0, K % 64 == 0.

    int4: two's complement, -8..7; nvfp4: E2M1 nibbles, 0..15. ValueError for codes outside that range.
    """
    require_shape("codes", codes, (128, 64))
    low, high = _code_range(precision)
    least, most = (int(bound) for bound in codes.aminmax())
    if least < low or most > high:
        raise ValueError(f"{precision.name} codes must be in {low}..{high}, but are in {least}..{most}")
    rows, columns = codes.shape
    words = join_nibbles(codes).view(torch.int32)
    return _layout(rows, columns).apply(words).view(torch.int8).reshape(rows, columns // 2)


def unpack_codes(qweight: Tensor, precision: Precision) -> Tensor:
    """(N, K/2) int8 -> (N, K) int8: int4 -8..7, nvfp4 0..15. The inverse of `pack_codes`."""
    require_shape("qweight", qweight, (128, 32))
    rows, columns = qweight.shape[0], qweight.shape[1] * 2
    words = _layout(rows, columns).undo(qweight.contiguous().view(torch.int32))
    codes = split_nibbles(words.view(torch.uint8)).reshape(rows, columns).view(torch.int8)
    match precision:
        case Int4():
            return signed_nibbles(codes)
        case NvFp4():
            return codes


def _code_range(precision: Precision) -> tuple[int, int]:
    match precision:
        case Int4():
            return -8, 7
        case NvFp4():
            return 0, 15


def _layout(rows: int, columns: int) -> Layout:
    # n = 128 tile + 16 strip + 8 half + lane row; k = 64 tile + 32 half + 8 lane column + code in word
    return Layout(split=(rows // 128, 8, 2, 8, columns // 64, 2, 4), order=(0, 4, 1, 3, 6, 2, 5))
