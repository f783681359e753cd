"""The 16-bit low-rank factors as tensor-core fragments of 16 by 16 (Nunchaku weight layout).

The rank plays the row in `down` and the column in `up`, so ranks are joined by unpacking, concatenating and
packing again, never by gluing stored tensors.
"""

from __future__ import annotations

from torch import Tensor

from svdq_cli.pack.tiles import Layout, require_shape, require_width


def pack_down(down: Tensor) -> Tensor:
    """(R, K) 16-bit -> (K, R). R % 16 == 0, K % 16 == 0."""
    require_shape("down", down, (16, 16))
    require_width("down", down, bytes_each=2)
    rank, columns = down.shape
    return _down_layout(rank, columns).apply(down).reshape(columns, rank)


def unpack_down(stored: Tensor) -> Tensor:
    """(K, R) -> (R, K). The inverse of `pack_down`."""
    require_shape("stored down", stored, (16, 16))
    columns, rank = stored.shape
    return _down_layout(rank, columns).undo(stored).reshape(rank, columns)


def pack_up(up: Tensor) -> Tensor:
    """(N, R) 16-bit -> (N, R). N % 16 == 0, R % 16 == 0."""
    require_shape("up", up, (16, 16))
    require_width("up", up, bytes_each=2)
    rows, rank = up.shape
    return _up_layout(rows, rank).apply(up).reshape(rows, rank)


def unpack_up(stored: Tensor) -> Tensor:
    """(N, R) -> (N, R). The inverse of `pack_up`."""
    require_shape("stored up", stored, (16, 16))
    rows, rank = stored.shape
    return _up_layout(rows, rank).undo(stored).reshape(rows, rank)


def _down_layout(rank: int, columns: int) -> Layout:
    # r = 16 tile + 8 half + lane row; k = 16 tile + 8 half + 2 lane column + element. K tiles are outermost.
    return Layout(split=(rank // 16, 2, 8, columns // 16, 2, 4, 2), order=(3, 0, 2, 5, 1, 4, 6))


def _up_layout(rows: int, rank: int) -> Layout:
    # n = 16 tile + 8 half + lane row; r = 16 tile + 8 half + 2 lane column + element. N tiles are outermost.
    return Layout(split=(rows // 16, 2, 8, rank // 16, 2, 4, 2), order=(0, 3, 2, 5, 1, 4, 6))
