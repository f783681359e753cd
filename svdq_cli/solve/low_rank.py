"""The low-rank branch: truncated SVD by randomized subspace iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
    stacked = _Stacked(parts, smooth)
    return low_rank_of(stacked, rank=rank, seed=seed, power_iterations=power_iterations, start=start)


def low_rank_of(
    matrix: Multiplied,
    *,
    rank: int,
    seed: int,
    power_iterations: int = POWER_ITERATIONS,
    start: Tensor | None = None,
) -> LowRank:
    """`find_low_rank` of a matrix (N, K) that is known by its products with few columns."""
    rows, columns = matrix.shape
    device = matrix.device
    if rank == 0:
        down, up = (
            torch.zeros(*shape, device=device, dtype=torch.float32) for shape in ((rows, 0), (0, columns))
        )
        return LowRank(down, up, None)
    if rank + OVERSAMPLE >= min(rows, columns):
        left, values, right = torch.linalg.svd(_whole(matrix), full_matrices=False)
        basis = None
    elif start is not None:
        inputs = torch.linalg.qr(matrix.transposed_times(start)).Q
        basis, values, small = torch.linalg.svd(matrix.times(inputs), full_matrices=False)
        left, right = basis, small @ inputs.T
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(columns, rank + OVERSAMPLE, generator=generator, dtype=torch.float32)
        basis = torch.linalg.qr(matrix.times(drawn.to(device))).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(matrix.transposed_times(basis)).Q
            basis = torch.linalg.qr(matrix.times(basis)).Q
        right, values, small = torch.linalg.svd(matrix.transposed_times(basis), full_matrices=False)
        left, right = basis @ small.T, right.T
    root = values[:rank].sqrt()
    return LowRank(left[:, :rank] * root, right[:rank] * root.unsqueeze(1), basis)


def _whole(matrix: Multiplied) -> Tensor:
    """All its numbers, (N, K), by a product with no more columns than its shorter side has."""
    rows, columns = matrix.shape
    identity = torch.eye(min(rows, columns), device=matrix.device, dtype=torch.float32)
    return matrix.times(identity) if columns <= rows else matrix.transposed_times(identity).T


class Multiplied(Protocol):
    """A matrix (N, K) that is only multiplied with few columns, in float32."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def times(self, columns: Tensor, /) -> Tensor:
        """It, @ `columns` (K, few)."""
        ...

    def transposed_times(self, columns: Tensor, /) -> Tensor:
        """It, transposed, @ `columns` (N, few)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Stacked:
    """Weights (N_i, K) under one another, their columns multiplied by `smooth` (K,); nothing of it is copied."""

    parts: Sequence[Tensor]
    smooth: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(map(len, self.parts)), self.parts[0].shape[1]))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def times(self, columns: Tensor) -> Tensor:
        if self.smooth is not None:
            columns = columns * self.smooth.unsqueeze(1)
        blocks = [rows for part in self.parts for rows in part.split(_rows_at_once(part))]
        return torch.cat([rows.float() @ columns for rows in blocks])

    def transposed_times(self, columns: Tensor) -> Tensor:
        product: Tensor | None = None
        for own, part in zip(columns.split([len(part) for part in self.parts]), self.parts, strict=True):
            # In pieces only where they are converted: one product with many rows is faster than several.
            step = len(part) if part.dtype == torch.float32 else _rows_at_once(part)
            for few, rows in zip(own.split(step), part.split(step), strict=True):
                if product is None:
                    product = few.T @ rows.float()
                else:
                    product.addmm_(few.T, rows.float())
        assert product is not None
        return (product if self.smooth is None else product.mul_(self.smooth)).T


def _rows_at_once(part: Tensor) -> int:
    return _ROWS if part.device.type == "cpu" else len(part)
