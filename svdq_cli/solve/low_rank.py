"""The low-rank branch: truncated SVD by randomized subspace iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OVERSAMPLE = 16  # extra directions carried along; they cost little and make the kept ones accurate
POWER_ITERATIONS = 4
# Rows of a weight that a CPU multiplies at a time: products with few columns are up to a fifth faster in such pieces.
_ROWS = 2048


def split_low_rank(
    weight: Tensor | Sequence[Tensor],
    *,
    rank: int,
    seed: int,
    power_iterations: int = POWER_ITERATIONS,
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Truncated SVD of `weight` (N, K) (Halko, Martinsson and Tropp 2011, algorithm 4.4), its columns multiplied by
    `smooth` (K,). Several weights (N_i, K) are taken as one with all of their rows; neither they nor the products with
    `smooth` are copied.

    Returns (up (N, R), down (R, K)), float32, with the singular values split evenly between the two, so that neither
    loses more than the other when it is rounded to 16 bits. The same seed gives the same result on one device type.
    """
    parts = [weight] if isinstance(weight, Tensor) else weight
    rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
    if rank == 0:
        return parts[0].new_zeros(rows, 0), parts[0].new_zeros(0, columns)
    if rank + OVERSAMPLE >= min(rows, columns):
        whole = torch.cat([part if smooth is None else part * smooth for part in parts])
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(columns, rank + OVERSAMPLE, generator=generator).to(parts[0])
        basis = torch.linalg.qr(_times(parts, sketch, smooth)).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(_transposed_times(basis, parts, smooth).T).Q
            basis = torch.linalg.qr(_times(parts, basis, smooth)).Q
        small, values, right = torch.linalg.svd(_transposed_times(basis, parts, smooth), full_matrices=False)
        left = basis @ small
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank] * root.unsqueeze(1)


def _times(parts: Sequence[Tensor], columns: Tensor, smooth: Tensor | None) -> Tensor:
    """The weight (N, K) @ `columns` (K, few)."""
    if smooth is not None:
        columns = columns * smooth.unsqueeze(1)
    step = _ROWS if columns.device.type == "cpu" else max(len(part) for part in parts)
    return torch.cat([rows @ columns for part in parts for rows in part.split(step)])


def _transposed_times(basis: Tensor, parts: Sequence[Tensor], smooth: Tensor | None) -> Tensor:
    """`basis` (N, few), transposed, @ the weight (N, K)."""
    pieces = zip(basis.split([len(part) for part in parts]), parts, strict=True)
    first, *others = pieces
    product = first[0].T @ first[1]
    for rows, part in others:
        product.addmm_(rows.T, part)
    return product if smooth is None else product.mul_(smooth)
