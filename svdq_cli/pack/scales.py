"""Scales and per-channel vectors of W4A4 layers, as a warp loads them (Nunchaku weight layout)."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.tiles import Layout, require_shape, require_width


def pack_scales(scales: Tensor) -> Tensor:
    """int4 weight scales, (N, G) 16-bit -> (G, N). N % 128 == 0; G = K/64."""
    require_shape("scales", scales, (128, 1))
    require_width("scales", scales, bytes_each=2)
    rows, groups = scales.shape
    return _scale_layout(rows, groups).apply(scales).reshape(groups, rows)


def unpack_scales(stored: Tensor) -> Tensor:
    """(G, N) 16-bit -> (N, G). The inverse of `pack_scales`."""
    require_shape("stored scales", stored, (1, 128))
    groups, rows = stored.shape
    return _scale_layout(rows, groups).undo(stored).reshape(rows, groups)


def pack_micro_scales(scales: Tensor) -> Tensor:
    """nvfp4 micro scales, (N, G) float8_e4m3fn -> (G, N). N % 128 == 0, G % 4 == 0; G = K/16."""
    require_shape("micro scales", scales, (128, 4))
    require_width("micro scales", scales, bytes_each=1)
    rows, groups = scales.shape
    moved = _micro_layout(rows, groups).apply(scales.contiguous().view(torch.uint8))
    return moved.view(scales.dtype).reshape(groups, rows)


def unpack_micro_scales(stored: Tensor) -> Tensor:
    """(G, N) float8_e4m3fn -> (N, G). The inverse of `pack_micro_scales`."""
    require_shape("stored micro scales", stored, (4, 128))
    require_width("stored micro scales", stored, bytes_each=1)
    groups, rows = stored.shape
    moved = _micro_layout(rows, groups).undo(stored.contiguous().view(torch.uint8))
    return moved.view(stored.dtype).reshape(rows, groups)


def pack_vector(vector: Tensor) -> Tensor:
    """Bias, smooth factor or channel scales, (L,) 16-bit -> (L,). L % 128 == 0.

    Inside every 16 channels the stored order is 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.
    """
    require_shape("vector", vector, (128,))
    return pack_scales(vector.unsqueeze(1)).squeeze(0)


def unpack_vector(stored: Tensor) -> Tensor:
    """(L,) -> (L,). The inverse of `pack_vector`."""
    require_shape("stored vector", stored, (128,))
    return unpack_scales(stored.unsqueeze(0)).squeeze(1)


def _scale_layout(rows: int, groups: int) -> Layout:
    # n = 128 tile + 16 strip + 8 half + 2 pair + element: a lane owns a pair of both halves
    return Layout(split=(rows // 128, 8, 2, 4, 2, groups), order=(0, 5, 1, 3, 2, 4))


def _micro_layout(rows: int, groups: int) -> Layout:
    # n = 128 tile + 32 quarter + 8 strip + lane row; the four scales of one 64-wide K step stay together
    return Layout(split=(rows // 128, 4, 4, 8, groups // 4, 4), order=(0, 4, 3, 2, 1, 5))
