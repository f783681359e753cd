"""After rounding, the low-rank branch is fitted once more to what the 4-bit part leaves over.

Ours. Reduced-rank regression (Izenman 1975) with a ridge that pulls toward the branch there is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.solve.low_rank import split_low_rank

RIDGE = 0.1  # share of the mean second moment; between 0.05 and 0.3 the result hardly changes


def ridge_for(rows: Tensor) -> float:
    """The ridge for inputs (M, K): more than usual where there are fewer than ten rows a channel, or it fits chance."""
    return max(RIDGE, rows.shape[1] / len(rows))


def refit_branch(
    rows: Tensor, missing: Tensor, product: Tensor, *, rank: int, ridge: float, seed: int
) -> tuple[Tensor, Tensor] | None:
    """A new (up (N, R), down (R, K)) for inputs `rows` (M, K), in the coordinates of `rows`.

    `product` (N, K) is the present branch U·D, `missing` (M, N) what the layer's output still lacks with it. Minimizes
    |missing - rows (B - product^T)|^2 + ridge |B - product^T|^2 over B (K, N) of rank R: with C = G G^T the damped
    second moment, the best B is G^-T times the truncated SVD of G^-1 (C product^T + rows^T missing). None without a
    usable C.
    """
    gram = rows.T @ rows
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    root, failed = torch.linalg.cholesky_ex(gram.double())
    if int(failed):
        return None
    root = root.to(rows.dtype)
    target = torch.linalg.solve_triangular(root, gram @ product.T + rows.T @ missing, upper=False)
    left, right = split_low_rank(target, rank=rank, seed=seed)  # (K, R), (R, N)
    down = torch.linalg.solve_triangular(root.T, left, upper=True).T
    return right.T, down
