"""The low-rank branch: truncated SVD by randomized subspace iteration."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLE = 16  # extra directions carried along; they cost little and make the kept ones accurate
POWER_ITERATIONS = 4


def split_low_rank(
    weight: Tensor, *, rank: int, seed: int, power_iterations: int = POWER_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """Truncated SVD of `weight` (N, K) (Halko, Martinsson and Tropp 2011, algorithm 4.4).

    Returns (up (N, R), down (R, K)), float32, with the singular values split evenly between the two, so that neither
    loses more than the other when it is rounded to 16 bits. The same seed gives the same result on one device type.
    """
    rows, columns = weight.shape
    if rank == 0:
        return weight.new_zeros(rows, 0), weight.new_zeros(0, columns)
    if rank + OVERSAMPLE >= min(rows, columns):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        sketch = torch.randn(columns, rank + OVERSAMPLE, generator=generator).to(weight)
        basis = torch.linalg.qr(weight @ sketch).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(weight.T @ basis).Q
            basis = torch.linalg.qr(weight @ basis).Q
        small, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        left = basis @ small
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank] * root.unsqueeze(1)
