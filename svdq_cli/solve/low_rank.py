"""The low-rank branch: truncated SVD by randomized subspace iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLE = 16  # extra directions carried along; they cost little and make the kept ones accurate
POWER_ITERATIONS = 4
SEARCH_POWER_ITERATIONS = 1  # a rougher SVD ranks the same
# Rows of a weight that a CPU multiplies at a time: products with few columns are up to a fifth faster in such pieces.
_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A truncated SVD: up @ down is nearest to a weight (N, K) among matrices of rank R."""

    up: Tensor  # (N, R) float32
    down: Tensor  # (R, K) float32
    # (N, R + OVERSAMPLE) orthonormal columns that it was found in; None where it is exact
    basis: Tensor | None


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
    found = find_low_rank(weight, rank=rank, seed=seed, power_iterations=power_iterations, smooth=smooth)
    return found.up, found.down


def find_low_rank(
    weight: Tensor | Sequence[Tensor],
    *,
    rank: int,
    seed: int,
    power_iterations: int = POWER_ITERATIONS,
    smooth: Tensor | None = None,
    start: Tensor | None = None,
) -> LowRank:
    """`split_low_rank` with the basis it was found in.

    `start`: the basis of a weight that is nearly this one, from which one step of subspace iteration is enough. Weights
    in 16 bits are read in float32, some rows at a time. `weight` is (N, K), or several under one another."""
    parts = [weight] if isinstance(weight, Tensor) else weight
    rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
    if rank == 0:
        empty = parts[0].new_zeros(0, dtype=torch.float32)
        return LowRank(empty.reshape(rows, 0), empty.reshape(0, columns), None)
    if rank + OVERSAMPLE >= min(rows, columns):
        whole = torch.cat([(part if smooth is None else part * smooth).float() for part in parts])
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        basis = None
    elif start is not None:
        inputs = torch.linalg.qr(_transposed_times(start, parts, smooth).T).Q
        basis, values, small = torch.linalg.svd(_times(parts, inputs, smooth), full_matrices=False)
        left, right = basis, small @ inputs.T
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(columns, rank + OVERSAMPLE, generator=generator).to(parts[0].device)
        basis = torch.linalg.qr(_times(parts, sketch, smooth)).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(_transposed_times(basis, parts, smooth).T).Q
            basis = torch.linalg.qr(_times(parts, basis, smooth)).Q
        small, values, right = torch.linalg.svd(_transposed_times(basis, parts, smooth), full_matrices=False)
        left = basis @ small
    root = values[:rank].sqrt()
    return LowRank(left[:, :rank] * root, right[:rank] * root.unsqueeze(1), basis)


def _times(parts: Sequence[Tensor], columns: Tensor, smooth: Tensor | None) -> Tensor:
    """The weight (N, K) @ `columns` (K, few)."""
    if smooth is not None:
        columns = columns * smooth.unsqueeze(1)
    return torch.cat([rows.float() @ columns for part in parts for rows in part.split(_rows_at_once(part))])


def _transposed_times(basis: Tensor, parts: Sequence[Tensor], smooth: Tensor | None) -> Tensor:
    """`basis` (N, few), transposed, @ the weight (N, K)."""
    product: Tensor | None = None
    for columns, part in zip(basis.split([len(part) for part in parts]), parts, strict=True):
        # In pieces only where they are converted: one product with many rows is faster than several.
        step = len(part) if part.dtype == torch.float32 else _rows_at_once(part)
        for few, rows in zip(columns.split(step), part.split(step), strict=True):
            if product is None:
                product = few.T @ rows.float()
            else:
                product.addmm_(few.T, rows.float())
    assert product is not None
    return product if smooth is None else product.mul_(smooth)


def _rows_at_once(part: Tensor) -> int:
    return _ROWS if part.device.type == "cpu" else len(part)
