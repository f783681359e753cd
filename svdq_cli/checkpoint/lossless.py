"""Moving tensors about without losing a bit, float8 included, which not every torch indexes or joins on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """`tensor[indices]`, also for float8. (N, ...) by (n,) integers -> (n, ...)."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8)[indices].view(tensor.dtype)
    return tensor[indices]


def join(tensors: list[Tensor], *, dim: int = 0) -> Tensor:
    """`torch.cat`, also for float8. Tensors of any shape that `torch.cat` joins."""
    if tensors[0].dtype == torch.float8_e4m3fn:
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors], dim).view(tensors[0].dtype)
    return torch.cat(tensors, dim)


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """The blocks along the diagonal, zeros elsewhere. Blocks (N, R) -> (sum of N, sum of R)."""
    rows, columns = sum(block.shape[0] for block in blocks), sum(block.shape[1] for block in blocks)
    joined = blocks[0].new_zeros(rows, columns)
    row = column = 0
    for block in blocks:
        joined[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return joined


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """The same bits. Of any shape."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
