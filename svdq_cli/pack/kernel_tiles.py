"""The layouts of svdq's own CUDA kernels: fragments of the tensor cores, so that a lane reads its share in 16 bytes.

`kernels/fragments.cuh` states each layout in words. g is a lane's row or column in a fragment (lane / 4), t its place
in the quad (lane % 4); a step of every kernel covers 64 columns. Rows must already be padded to whole tiles
(`pack.padding`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.tiles import Layout, join_nibbles, require_shape, require_width, split_nibbles

STEP = 64  # columns

# ------------------------------------------------------------------------------------------ codes


def pack_weight_codes(codes: Tensor) -> Tensor:
    """(N, K) integers, of which four bits count -> (K/64, N/16, 32, 4) int32. N % 16 == 0, K % 64 == 0."""
    require_shape("codes", codes, (16, STEP))
    return _join(_weight_codes(*codes.shape).apply(codes), codes.shape[0])


def unpack_weight_codes(words: Tensor) -> Tensor:
    """The inverse of `pack_weight_codes`: (N, K) uint8, 0..15."""
    rows, columns = _code_shape(words)
    return _weight_codes(rows, columns).undo(split_nibbles(_bytes(words))).reshape(rows, columns)


def pack_row_codes(codes: Tensor) -> Tensor:
    """Codes of activations, (M, K) -> (K/64, M/16, 32, 4) int32. M % 16 == 0, K % 64 == 0."""
    require_shape("codes", codes, (16, STEP))
    return _join(_row_codes(*codes.shape).apply(codes), codes.shape[0])


def unpack_row_codes(words: Tensor) -> Tensor:
    """The inverse of `pack_row_codes`: (M, K) uint8, 0..15."""
    rows, columns = _code_shape(words)
    return _row_codes(rows, columns).undo(split_nibbles(_bytes(words))).reshape(rows, columns)


def pack_w4a16_weight(codes: Tensor) -> Tensor:
    """Codes of W4A16 layers, (N, K) in 0..15 -> (K/64, N/16, 32, 4) int32. N % 16 == 0, K % 64 == 0."""
    require_shape("codes", codes, (16, STEP))
    return _join(_w4a16_codes(*codes.shape).apply(codes).flatten(-2), codes.shape[0])


def unpack_w4a16_weight(words: Tensor) -> Tensor:
    """The inverse of `pack_w4a16_weight`: (N, K) uint8."""
    rows, columns = _code_shape(words)
    return _w4a16_codes(rows, columns).undo(split_nibbles(_bytes(words))).reshape(rows, columns)


def _weight_codes(rows: int, columns: int) -> Layout:
    # n = 16 tile + 8 side + g; k = 64 step + 32 half + 8 t + code in word
    return Layout(split=(rows // 16, 2, 8, columns // STEP, 2, 4, 8), order=(3, 0, 2, 5, 1, 4, 6))


def _row_codes(rows: int, columns: int) -> Layout:
    # m = 16 tile + 8 r + g; k = 64 step + 32 half + 8 t + code in word
    return Layout(split=(rows // 16, 2, 8, columns // STEP, 2, 4, 8), order=(3, 0, 2, 5, 4, 1, 6))


def _w4a16_codes(rows: int, columns: int) -> Layout:
    # as _weight_codes, with k = .. + 8 t + 2 pair + element: neighbors are 16 bits apart in a word
    return Layout(split=(rows // 16, 2, 8, columns // STEP, 2, 4, 4, 2), order=(3, 0, 2, 5, 1, 4, 7, 6))


# ------------------------------------------------------------------------------------------ scales


def pack_column_scales(scales: Tensor) -> Tensor:
    """int4 scales of weights, (N, K/64) 16-bit -> (K/64, N). N % 64 == 0."""
    require_shape("scales", scales, (64, 1))
    require_width("scales", scales, bytes_each=2)
    return _column_scales(*scales.shape).apply(scales).reshape(scales.shape[1], scales.shape[0])


def unpack_column_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_column_scales`. (K/64, N) -> (N, K/64)."""
    steps, rows = stored.shape
    return _column_scales(rows, steps).undo(stored).reshape(rows, steps)


def pack_column_micro_scales(scales: Tensor) -> Tensor:
    """nvfp4 scales of weights, (N, K/16) float8_e4m3fn -> (K/64, N) int32. N % 64 == 0, K % 64 == 0."""
    require_shape("scales", scales, (64, 4))
    require_width("scales", scales, bytes_each=1)
    rows, groups = scales.shape
    return _words(_column_micro_scales(rows, groups).apply(scales.contiguous().view(torch.uint8)), rows)


def unpack_column_micro_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_column_micro_scales`. (K/64, N) int32 -> (N, K/16) float8_e4m3fn."""
    steps, rows = stored.shape
    found = _column_micro_scales(rows, 4 * steps).undo(_bytes(stored)).reshape(rows, 4 * steps)
    return found.view(torch.float8_e4m3fn)


def pack_row_scales(scales: Tensor) -> Tensor:
    """int4 scales of activations, (M, K/64) 16-bit -> (K/64, M). M % 32 == 0."""
    require_shape("scales", scales, (32, 1))
    require_width("scales", scales, bytes_each=2)
    return _row_scales(*scales.shape).apply(scales).reshape(scales.shape[1], scales.shape[0])


def unpack_row_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_row_scales`. (K/64, M) -> (M, K/64)."""
    steps, rows = stored.shape
    return _row_scales(rows, steps).undo(stored).reshape(rows, steps)


def pack_row_micro_scales(scales: Tensor) -> Tensor:
    """nvfp4 scales of activations, (M, K/16) float8_e4m3fn -> (K/64, M) int32. M % 32 == 0, K % 64 == 0."""
    require_shape("scales", scales, (32, 4))
    require_width("scales", scales, bytes_each=1)
    rows, groups = scales.shape
    return _words(_row_micro_scales(rows, groups).apply(scales.contiguous().view(torch.uint8)), rows)


def unpack_row_micro_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_row_micro_scales`. (K/64, M) int32 -> (M, K/16) float8_e4m3fn."""
    steps, rows = stored.shape
    found = _row_micro_scales(rows, 4 * steps).undo(_bytes(stored)).reshape(rows, 4 * steps)
    return found.view(torch.float8_e4m3fn)


def _column_scales(rows: int, steps: int) -> Layout:
    # n = 64 block + 8 octet + 2 t + element: the columns of the product that a lane owns
    return Layout(split=(rows // 64, 8, 4, 2, steps), order=(4, 0, 2, 1, 3))


def _column_micro_scales(rows: int, groups: int) -> Layout:
    # n = 64 block + 8 octet + g: the columns of the weight that a lane dequantizes
    return Layout(split=(rows // 64, 8, 8, groups // 4, 4), order=(3, 0, 2, 1, 4))


def _row_scales(rows: int, steps: int) -> Layout:
    # m = 32 block + 8 i + g
    return Layout(split=(rows // 32, 4, 8, steps), order=(3, 0, 2, 1))


def _row_micro_scales(rows: int, groups: int) -> Layout:
    return Layout(split=(rows // 32, 4, 8, groups // 4, 4), order=(3, 0, 2, 1, 4))


# ------------------------------------------------------------------------------------------ low rank


def pack_down_fragments(down: Tensor) -> Tensor:
    """(R, K) 16-bit -> (K/64, R/8, 2, 32, 8). R % 8 == 0 (or R = 0), K % 64 == 0."""
    rank, columns = down.shape
    return _down(rank, columns).apply(down).reshape(columns // STEP, rank // 8, 2, 32, 8)


def unpack_down_fragments(stored: Tensor) -> Tensor:
    """The inverse of `pack_down_fragments`. (K/64, R/8, 2, 32, 8) -> (R, K)."""
    columns, rank = stored.shape[0] * STEP, stored.shape[1] * 8
    return _down(rank, columns).undo(stored).reshape(rank, columns)


def pack_up_fragments(up: Tensor) -> Tensor:
    """(N, R) 16-bit -> (R/16, N/16, 32, 8). N % 16 == 0, R % 16 == 0 (or R = 0)."""
    rows, rank = up.shape
    return _up(rows, rank).apply(up).reshape(rank // 16, rows // 16, 32, 8)


def unpack_up_fragments(stored: Tensor) -> Tensor:
    """The inverse of `pack_up_fragments`. (R/16, N/16, 32, 8) -> (N, R)."""
    rows, rank = stored.shape[1] * 16, stored.shape[0] * 16
    return _up(rows, rank).undo(stored).reshape(rows, rank)


def pack_hidden_fragments(hidden: Tensor) -> Tensor:
    """(M, R) 16-bit -> (R/16, M/16, 32, 8). M % 16 == 0, R % 16 == 0 (or R = 0)."""
    rows, rank = hidden.shape
    return _hidden(rows, rank).apply(hidden).reshape(rank // 16, rows // 16, 32, 8)


def unpack_hidden_fragments(stored: Tensor) -> Tensor:
    """The inverse of `pack_hidden_fragments`. (R/16, M/16, 32, 8) -> (M, R)."""
    rows, rank = stored.shape[1] * 16, stored.shape[0] * 16
    return _hidden(rows, rank).undo(stored).reshape(rows, rank)


def _down(rank: int, columns: int) -> Layout:
    # r = 8 octet + g; k = 64 step + 32 half + 8 t + element
    return Layout(split=(rank // 8, 8, columns // STEP, 2, 4, 8), order=(2, 0, 3, 1, 4, 5))


def _up(rows: int, rank: int) -> Layout:
    # n = 16 tile + 8 side + g; r = 16 tile + 8 half + 2 t + element
    return Layout(split=(rows // 16, 2, 8, rank // 16, 2, 4, 2), order=(3, 0, 2, 5, 1, 4, 6))


def _hidden(rows: int, rank: int) -> Layout:
    # m = 16 tile + 8 r + g; rank = 16 tile + 8 half + 2 t + element
    return Layout(split=(rows // 16, 2, 8, rank // 16, 2, 4, 2), order=(3, 0, 2, 5, 4, 1, 6))


# ------------------------------------------------------------------------------------------ words


def _join(nibbles: Tensor, rows: int) -> Tensor:
    return join_nibbles(nibbles).view(torch.int32).reshape(-1, rows // 16, 32, 4)


def _words(scales: Tensor, rows: int) -> Tensor:
    return scales.view(torch.int32).reshape(-1, rows)


def _bytes(words: Tensor) -> Tensor:
    if words.dtype != torch.int32:
        raise ValueError(f"packed words must be int32, but are {words.dtype}")
    return words.contiguous().view(torch.uint8)


def _code_shape(words: Tensor) -> tuple[int, int]:
    steps, tiles, lanes, each = words.shape
    if (lanes, each) != (32, 4):
        raise ValueError(f"packed codes must end in (32, 4), but have the shape {tuple(words.shape)}")
    return tiles * 16, steps * STEP
