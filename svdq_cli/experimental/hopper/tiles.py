"""The layouts of Hopper's own kernels: whole tiles, as one copy brings them to shared memory.

`hopper_tiles.cuh` states each layout. A tile holds 16-byte pieces of its rows, piece by piece: all rows' first
16 bytes, then all rows' second 16 bytes. Rows must already be padded to whole tiles (`pack.padding`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.tiles import Layout, require_shape

PIECE_BYTES = 16
PIECES = 4  # of a row in a tile: 64 e4m3 numbers, or 32 of 16 bits
GROUP = 64
TOKENS_TOGETHER = 16  # whose scales are permuted

# ------------------------------------------------------------------------------------------ rows


def pack_rows(rows: Tensor, *, tile: int) -> Tensor:
    """(R, C) -> (R/tile, C/width, 4, tile, width/4). `width` is 64 columns of one byte, or 32 of two. R % tile == 0,
    C % width == 0; C may be 0."""
    width = _width(rows)
    if rows.shape[1]:
        require_shape("rows", rows, (tile, width))
    count, columns = rows.shape
    return _rows(count, columns, tile, width).apply(rows)


def unpack_rows(stored: Tensor) -> Tensor:
    """The inverse of `pack_rows`. Back to (R, C)."""
    tiles, steps, pieces, tile, each = stored.shape
    width = pieces * each
    rows, columns = tiles * tile, steps * width
    return _rows(rows, columns, tile, width).undo(stored).reshape(rows, columns)


def _width(rows: Tensor) -> int:
    return PIECES * PIECE_BYTES // rows.element_size()


def _rows(rows: int, columns: int, tile: int, width: int) -> Layout:
    return Layout(
        split=(rows // tile, tile, columns // width, PIECES, width // PIECES), order=(0, 2, 3, 1, 4)
    )


# ------------------------------------------------------------------------------------------ scales


def pack_token_scales(scales: Tensor, *, tile: int) -> Tensor:
    """(M, groups) -> (M/tile, groups, tile), tokens in the order in which a lane reads them. M % tile == 0."""
    require_shape("scales", scales, (tile, 1))
    rows, groups = scales.shape
    return _token_scales(rows, groups, tile).apply(scales).reshape(rows // tile, groups, tile)


def unpack_token_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_token_scales`. (M/tile, groups, tile) -> (M, groups)."""
    tiles, groups, tile = stored.shape
    return _token_scales(tiles * tile, groups, tile).undo(stored).reshape(tiles * tile, groups)


def _token_scales(rows: int, groups: int, tile: int) -> Layout:
    # m = tile .. + 16 pair + 8 octet + 2 t + element: the columns of the product that a lane owns
    return Layout(split=(rows // tile, tile // TOKENS_TOGETHER, 2, 4, 2, groups), order=(0, 5, 1, 3, 2, 4))


def pack_feature_scales(scales: Tensor, *, tile: int) -> Tensor:
    """(N, K/64) -> (N/tile, K/64, tile). N % tile == 0."""
    require_shape("scales", scales, (tile, 1))
    return scales.unflatten(0, (-1, tile)).transpose(1, 2).contiguous()


def unpack_feature_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_feature_scales`. (N/tile, K/64, tile) -> (N, K/64)."""
    return stored.transpose(1, 2).flatten(0, 1).contiguous()


# ------------------------------------------------------------------------------------------ 4-bit codes


def pack_signed_codes(codes: Tensor, *, tile: int) -> Tensor:
    """Codes of weights, (N, K) in -8..7 -> (N/tile, K/64, tile/16, 32, 4) int32, as sign and magnitude.

    The magnitude of a negative code is stored less 1, so that -8 fits. N % tile == 0, K % 64 == 0. ValueError for codes
    outside that range.
    """
    require_shape("codes", codes, (tile, GROUP))
    if bool(((codes > 7) | (codes < -8)).any()):
        raise ValueError("codes must be in -8..7")
    rows, columns = codes.shape
    parts = _signed_codes(rows, columns, tile).apply(codes.to(torch.int8))
    negative = parts < 0
    # ~code is -code - 1
    magnitude, sign = torch.where(negative, ~parts, parts).to(torch.uint8), negative.to(torch.uint8)
    upper = magnitude[..., 0, :] | sign[..., 0, :] << 7
    lower = magnitude[..., 1, :] << 4 | sign[..., 1, :].roll(1, -1) << 3
    return (upper | lower).contiguous().view(torch.int32).reshape(rows // tile, columns // GROUP, -1, 32, 4)


def unpack_signed_codes(words: Tensor) -> Tensor:
    """The inverse of `pack_signed_codes`: (N, K) int8."""
    tiles, groups, sixteens, _, _ = words.shape
    tile = 16 * sixteens
    both = words.contiguous().view(torch.uint8).unflatten(-1, (4, 4))
    upper = _signed(both & 7, both >> 7)
    lower = _signed(both >> 4 & 7, (both >> 3 & 1).roll(-1, -1))
    parts = torch.stack((upper, lower), -2)
    rows, columns = tiles * tile, groups * GROUP
    return _signed_codes(rows, columns, tile).undo(parts).reshape(rows, columns)


def _signed(magnitude: Tensor, sign: Tensor) -> Tensor:
    held = magnitude.to(torch.int8)
    return torch.where(sign > 0, ~held, held)


def _signed_codes(rows: int, columns: int, tile: int) -> Layout:
    # n = tile .. + 16 sixteen + 8 r + g; k = 64 group + 16 word + 4 t + byte; memory: .. sixteen, g, t, word, r, byte
    return Layout(
        split=(rows // tile, tile // 16, 2, 8, columns // GROUP, 4, 4, 4), order=(0, 4, 1, 3, 6, 5, 2, 7)
    )
