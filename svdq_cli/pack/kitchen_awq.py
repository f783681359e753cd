"""comfy-kitchen's `awq_w4a16`: codes two a byte, rows one after another; scales and zeros by group, then row.

W = (code - 8) * scale + zeros: zeros are weights, counted from the middle code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.tiles import join_nibbles, split_nibbles

MIDDLE = 8


def pack_awq(codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 (N, K) uint8, scales and zeros (N, G) 16-bit of W = code * scale + zero -> (N, K/2) int8, (G, N),
    (G, N). ValueError where a zero counted from the middle code has more than 16 bits."""
    middle = zeros.float() + MIDDLE * scales.float()
    stored = middle.to(scales.dtype)
    if not torch.equal(stored.float() - MIDDLE * scales.float(), zeros.float()):
        raise ValueError("a zero, counted from the middle code, is not exact in 16 bits")
    return join_nibbles(codes).view(torch.int8), scales.T.contiguous(), stored.T.contiguous()


def unpack_awq(weight: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_awq`: (N, K/2) int8, (G, N), (G, N) -> codes (N, K) uint8, scales and zeros (N, G).
    ValueError where a zero counted from code 0 has more than 16 bits."""
    codes = split_nibbles(weight.contiguous().view(torch.uint8))
    lowest = zeros.float() - MIDDLE * scales.float()
    found = lowest.to(scales.dtype)
    if not torch.equal(found.float(), lowest):
        raise ValueError("a zero, counted from code 0, is not exact in 16 bits")
    return codes, scales.T.contiguous(), found.T.contiguous()
