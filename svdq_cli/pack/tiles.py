"""What all layouts share: split every axis, permute the parts, glue them again; and two nibbles to a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 19  # bytes that nibbles are joined to at a time: what that takes stays in the cache
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Split a tensor's axes into `split`, then put the parts into memory in `order`.

    `split` is what the tensor is reshaped to; `order[i]` is the part that becomes axis i.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor's parts in memory order, contiguous, still split. Of any shape that `split` splits."""
        parts = tensor.reshape(self.split)
        word = self._word(tensor.element_size())
        moved = (parts.contiguous().view(word) if word else parts).permute(self.order).contiguous()
        return moved.view(tensor.dtype) if word else moved

    def undo(self, stored: Tensor) -> Tensor:
        """The inverse: `stored` in any shape with these elements; returns the parts in their split order."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        parts = stored.reshape([self.split[part] for part in self.order])
        word = self._word(stored.element_size())
        moved = (parts.contiguous().view(word) if word else parts).permute(inverse).contiguous()
        return moved.view(stored.dtype) if word else moved

    def _word(self, element: int) -> torch.dtype | None:
        """The integers that a run of elements of this many bytes can be moved as, where the last part stays last:
        fewer, wider elements are permuted several times faster."""
        stays = self.order[-1] == len(self.split) - 1
        return _WORDS.get(self.split[-1] * element) if stays and self.split[-1] > 1 else None


def require_shape(what: str, tensor: Tensor, multiples: Sequence[int]) -> None:
    """ValueError unless each axis of `tensor` is a positive multiple of its entry in `multiples`. Of any shape."""
    if tensor.ndim != len(multiples):
        raise ValueError(f"{what} needs {len(multiples)} axes, but has the shape {tuple(tensor.shape)}")
    for axis, (size, multiple) in enumerate(zip(tensor.shape, multiples, strict=True)):
        if size == 0 or size % multiple:
            raise ValueError(
                f"{what}: axis {axis} must be a positive multiple of {multiple}, but is {size} long"
            )


def require_width(what: str, tensor: Tensor, *, bytes_each: int) -> None:
    """ValueError unless one element of `tensor` takes `bytes_each` bytes. Of any shape."""
    if tensor.element_size() != bytes_each:
        raise ValueError(f"{what} needs a dtype of {bytes_each} bytes, but is {tensor.dtype}")


def join_nibbles(nibbles: Tensor) -> Tensor:
    """(..., 2n) integers -> (..., n) uint8, the even element in the low half. Four bits of each count."""
    packed = torch.empty(
        *nibbles.shape[:-1], nibbles.shape[-1] // 2, dtype=torch.uint8, device=nibbles.device
    )
    blocks = zip(nibbles.reshape(-1).split(2 * _BLOCK), packed.view(-1).split(_BLOCK), strict=True)
    for some, out in blocks:
        # Two neighbors at a time, as one little-endian word; torch is not built for other machines.
        pairs = some.to(torch.uint8).view(torch.int16) & 0x0F0F
        out.copy_((pairs >> 4).bitwise_or_(pairs))
    return packed


def split_nibbles(packed: Tensor) -> Tensor:
    """(..., n) uint8 -> (..., 2n) uint8 in 0..15; the inverse of `join_nibbles`."""
    pairs = torch.empty(packed.shape, dtype=torch.int16, device=packed.device)
    for some, out in zip(packed.reshape(-1).split(_BLOCK), pairs.view(-1).split(_BLOCK), strict=True):
        out.copy_(some)
        out.bitwise_or_(out << 4).bitwise_and_(0x0F0F)
    return pairs.view(torch.uint8)


def signed_nibbles(nibbles: Tensor) -> Tensor:
    """0..15 as two's complement of four bits, -8..7, int8. Of any shape, which stays."""
    return (nibbles.view(torch.int8) ^ 8).sub_(8)
