"""Padding to whole tiles, for runtimes that know the true sizes and allocate padded tensors (classic
Nunchaku).

What to fill with is a contract of each tensor: 1 for smooth factors and scales (a zero would be divided
by), 0 for codes and low-rank factors. For bias 0 is harmless; 1 is what existing files hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ceil_div(size: int, by: int) -> int:
    """How many parts of the size `by` cover `size`."""
    return -(-size // by)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below `size`."""
    return ceil_div(size, multiple) * multiple


def pad_rows(rows: Tensor, *, multiple: int) -> Tensor:
    """Zeros below `rows` (N, ...), up to the next multiple."""
    return pad(rows, multiples=(multiple,) + (1,) * (rows.ndim - 1), fill=0)


def pad(tensor: Tensor, *, multiples: Sequence[int], fill: float) -> Tensor:
    """Grow every axis to the next multiple of its entry in `multiples`; new elements are `fill`. Of any shape."""
    if tensor.ndim != len(multiples):
        raise ValueError(f"{len(multiples)} multiples for a tensor of the shape {tuple(tensor.shape)}")
    shape = [round_up(*each) for each in zip(tensor.shape, multiples, strict=True)]
    grown = torch.full(shape, fill, device=tensor.device, dtype=torch.float32).to(tensor.dtype)
    crop(grown, shape=tensor.shape).copy_(tensor)
    return grown


def crop(tensor: Tensor, *, shape: Sequence[int]) -> Tensor:
    """The leading `shape` of `tensor`, as a view. The inverse of `pad`. Of any shape."""
    if tensor.ndim != len(shape) or any(
        small > large for small, large in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"the shape {tuple(tensor.shape)} has no part of the shape {tuple(shape)}")
    return tensor[tuple(slice(size) for size in shape)]
