"""The layouts of svdq's own CPU engine, which `kernels/cpu/layouts.h` states in words.

Weights are in panels of 16 columns, activations in blocks of 6 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.padding import pad
from svdq_cli.pack.tiles import Layout

PANEL = 16  # columns, which are rows of a weight
BLOCK = 6  # rows of an activation
STEP = 64  # columns that K is padded to
RANK_TILE = 16


def pack_codes(nibbles: Tensor) -> Tensor:
    """(N, K) uint8 0..15 -> (N/16, K/8, 16, 4) uint8. N % 16 == 0, K % 8 == 0."""
    n, k = nibbles.shape
    halves = _codes(n, k).apply(nibbles)
    return halves[..., 0, :] | halves[..., 1, :] << 4


def unpack_codes(stored: Tensor) -> Tensor:
    """The inverse of `pack_codes`. (N/16, K/8, 16, 4) -> (N, K)."""
    panels, lines = stored.shape[:2]
    n, k = panels * PANEL, lines * 8
    return _codes(n, k).undo(torch.stack((stored & 15, stored >> 4), -2)).reshape(n, k)


def pack_scales(scales: Tensor) -> Tensor:
    """(N, G) -> (N/16, G, 16). N % 16 == 0."""
    n, groups = scales.shape
    return scales.reshape(n // PANEL, PANEL, groups).transpose(1, 2).contiguous()


def unpack_scales(stored: Tensor) -> Tensor:
    """The inverse of `pack_scales`. (N/16, G, 16) -> (N, G)."""
    return stored.transpose(1, 2).reshape(-1, stored.shape[1])


def pack_down(down: Tensor) -> Tensor:
    """(R, K) -> (K/2, R, 2), with R padded to 16 and K to 64."""
    padded = pad(down, multiples=(RANK_TILE, STEP), fill=0)
    return padded.reshape(padded.shape[0], padded.shape[1] // 2, 2).transpose(0, 1).contiguous()


def unpack_down(stored: Tensor) -> Tensor:
    """(R, K), padded as `pack_down` does."""
    return stored.transpose(0, 1).reshape(stored.shape[1], 2 * stored.shape[0])


def pack_up(up: Tensor) -> Tensor:
    """(N, R) -> (N/16, R/2, 16, 2), with N and R padded to 16."""
    padded = pad(up, multiples=(PANEL, RANK_TILE), fill=0)
    n, rank = padded.shape
    return padded.reshape(n // PANEL, PANEL, rank // 2, 2).transpose(1, 2).contiguous()


def unpack_up(stored: Tensor) -> Tensor:
    """(N, R), padded as `pack_up` does."""
    panels, pairs = stored.shape[:2]
    return stored.transpose(1, 2).reshape(panels * PANEL, 2 * pairs)


def unpack_hidden(stored: Tensor) -> Tensor:
    """(blocks, R/2, 6, 2) -> (M, R), M padded to whole blocks."""
    blocks, pairs = stored.shape[:2]
    return stored.transpose(1, 2).reshape(blocks * BLOCK, 2 * pairs)


def unpack_row_codes(stored: Tensor) -> Tensor:
    """(blocks, K/4, 6, 4) int8 -> (M, K), both padded."""
    blocks, fours = stored.shape[:2]
    return stored.transpose(1, 2).reshape(blocks * BLOCK, 4 * fours)


def unpack_row_scales(stored: Tensor) -> Tensor:
    """(2, blocks, G, 6): of scales and starts the scales, (M, G) float32, M padded."""
    return stored[0].transpose(1, 2).reshape(-1, stored.shape[2])


def _codes(n: int, k: int) -> Layout:
    # n = 16 panel + column; k = 8 line + 4 half + i
    return Layout(split=(n // PANEL, PANEL, k // 8, 2, 4), order=(0, 2, 1, 3, 4))
