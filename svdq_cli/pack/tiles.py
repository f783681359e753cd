"""What all layouts share: split every axis, permute the parts, glue them again; and two nibbles to a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Split a tensor's axes into `split`, then put the parts into memory in `order`.

    `split` is what the tensor is reshaped to; `order[i]` is the part that becomes axis i.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor's parts in memory order, contiguous, still split."""
        return tensor.reshape(self.split).permute(self.order).contiguous()

    def undo(self, stored: Tensor) -> Tensor:
        """The inverse: `stored` in any shape with these elements; returns the parts in their split order."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.reshape([self.split[part] for part in self.order]).permute(inverse).contiguous()


def require_shape(what: str, tensor: Tensor, multiples: Sequence[int]) -> None:
    """ValueError unless each axis of `tensor` is a positive multiple of its entry in `multiples`."""
    if tensor.ndim != len(multiples):
        raise ValueError(f"{what} needs {len(multiples)} axes, but has the shape {tuple(tensor.shape)}")
    for axis, (size, multiple) in enumerate(zip(tensor.shape, multiples, strict=True)):
        if size == 0 or size % multiple:
            raise ValueError(
                f"{what}: axis {axis} must be a positive multiple of {multiple}, but is {size} long"
            )


def require_width(what: str, tensor: Tensor, *, bytes_each: int) -> None:
    """ValueError unless one element of `tensor` takes `bytes_each` bytes."""
    if tensor.element_size() != bytes_each:
        raise ValueError(f"{what} needs a dtype of {bytes_each} bytes, but is {tensor.dtype}")


def join_nibbles(nibbles: Tensor) -> Tensor:
    """(..., 2n) integers -> (..., n) uint8, the even element in the low half. Four bits of each count."""
    bits = nibbles.to(torch.uint8) & 15
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


def split_nibbles(packed: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 2n) uint8 in 0..15; the inverse of `join_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
