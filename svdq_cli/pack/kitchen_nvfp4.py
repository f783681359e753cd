"""comfy-kitchen's `nvfp4`: codes two a byte, rows one after another, the even column in the *high* half. Micro scales
lie as cuBLAS wants them: in blocks of 128 rows by 4 groups, padded with zeros, in each of which rows 32 apart are
neighbors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.row_major import pack_rows, unpack_rows
from svdq_cli.pack.tiles import require_shape
from svdq_cli.records import NvFp4

ROWS, GROUPS = 128, 4  # of a block of scales
_APART = 32


def pack_nvfp4_codes(codes: Tensor) -> Tensor:
    """E2M1 nibbles (N, K) int8 -> (N, K/2) uint8. K % 2 == 0. ValueError for codes that are no nibbles."""
    return pack_rows(_neighbors_swapped(codes), NvFp4()).view(torch.uint8)


def unpack_nvfp4_codes(stored: Tensor) -> Tensor:
    """(N, K/2) uint8 -> (N, K) int8. The inverse of `pack_nvfp4_codes`."""
    return _neighbors_swapped(unpack_rows(stored.contiguous().view(torch.int8), NvFp4()))


def scale_shape(rows: int, groups: int) -> tuple[int, int]:
    """The shape in which the micro scales (N, G) of a weight are stored."""
    return -(-rows // ROWS) * ROWS, -(-groups // GROUPS) * GROUPS


def pack_block_scales(scales: Tensor) -> Tensor:
    """Micro scales (N, G) float8_e4m3fn -> (N, G) in whole blocks."""
    require_shape("micro scales", scales, (1, 1))
    rows, groups = scales.shape
    high, wide = scale_shape(rows, groups)
    whole = torch.zeros(high, wide, dtype=torch.uint8, device=scales.device)
    whole[:rows, :groups] = scales.contiguous().view(torch.uint8)
    blocks = whole.reshape(high // ROWS, ROWS // _APART, _APART, wide // GROUPS, GROUPS)
    return blocks.permute(0, 3, 2, 1, 4).reshape(high, wide).view(scales.dtype)


def unpack_block_scales(stored: Tensor, rows: int, groups: int) -> Tensor:
    """Whole blocks -> (N, G) of `rows` and `groups`. The inverse of `pack_block_scales`; ValueError where the padding
    is not zero."""
    high, wide = scale_shape(rows, groups)
    require_shape("stored micro scales", stored, (ROWS, GROUPS))
    if tuple(stored.shape) != (high, wide):
        raise ValueError(f"micro scales have the shape {tuple(stored.shape)} instead of {(high, wide)}")
    blocks = stored.contiguous().view(torch.uint8)
    blocks = blocks.reshape(high // ROWS, wide // GROUPS, _APART, ROWS // _APART, GROUPS)
    whole = blocks.permute(0, 3, 2, 1, 4).reshape(high, wide)
    if bool(whole[rows:].any()) or bool(whole[:, groups:].any()):
        raise ValueError("the padding of the micro scales is not zero")
    return whole[:rows, :groups].contiguous().view(stored.dtype)


def _neighbors_swapped(codes: Tensor) -> Tensor:
    require_shape("codes", codes, (1, 2))
    return codes.unflatten(1, (-1, 2)).flip(2).flatten(1)
