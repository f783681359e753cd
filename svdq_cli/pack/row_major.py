"""Two codes a byte, rows one after another: the layout of runtimes that arrange weights themselves when they load."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.tiles import join_nibbles, require_shape, signed_nibbles, split_nibbles
from svdq_cli.records import Int4, NvFp4, Precision


def pack_rows(codes: Tensor, precision: Precision) -> Tensor:
    """(N, K) integers -> (N, K/2) int8, the even column in the low half. K % 2 == 0.

    int4: two's complement, -8..7; nvfp4: E2M1 nibbles, 0..15. ValueError for codes outside that range.
    """
    require_shape("codes", codes, (1, 2))
    low, high = (-8, 7) if isinstance(precision, Int4) else (0, 15)
    least, most = (int(bound) for bound in codes.aminmax())
    if least < low or most > high:
        raise ValueError(f"{precision.name} codes must be in {low}..{high}, but are in {least}..{most}")
    return join_nibbles(codes).view(torch.int8)


def unpack_rows(stored: Tensor, precision: Precision) -> Tensor:
    """(N, K/2) int8 -> (N, K) int8: int4 -8..7, nvfp4 0..15. The inverse of `pack_rows`."""
    require_shape("qweight", stored, (1, 1))
    codes = split_nibbles(stored.contiguous().view(torch.uint8)).view(torch.int8)
    match precision:
        case Int4():
            return signed_nibbles(codes)
        case NvFp4():
            return codes
