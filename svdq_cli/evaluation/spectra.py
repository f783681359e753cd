"""How a layer's singular values decay before and after smoothing, and what its low-rank branch leaves over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEADING = 256  # singular values kept of a matrix
EXACT_SIDE = 4096  # a matrix whose shorter side is longer gets a randomized SVD
_OVERSAMPLING = 64  # values beyond LEADING that keep the last of them accurate


@dataclass(frozen=True, slots=True, eq=False)
class Spectra:
    """Leading singular values, largest first, float64: of W over its Frobenius norm, of the smoothed weight
    W diag(s) and of the residual (W - U D) diag(s) over the smoothed weight's."""

    weight: Tensor
    smoothed: Tensor
    residual: Tensor
    left_over: float  # Frobenius norm of the residual over that of the smoothed weight
    exact: bool  # False: by randomized SVD


def spectra_of(weight: Tensor, smooth: Tensor, branch: Tensor, *, exact_side: int = EXACT_SIDE) -> Spectra:
    """`weight` and `branch` = U D (N, K), `smooth` (K,), which divides the activation: any float dtype, on the CPU."""
    plain = weight.float()
    scale = smooth.float()
    smoothed, residual = plain * scale, (plain - branch.float()) * scale
    norm = _norm(smoothed)
    return Spectra(
        weight=_leading(plain, exact_side) / _norm(plain),
        smoothed=_leading(smoothed, exact_side) / norm,
        residual=_leading(residual, exact_side) / norm,
        left_over=float(residual.double().norm()) / norm,
        exact=min(plain.shape) <= exact_side,
    )


def _norm(matrix: Tensor) -> float:
    return float(matrix.double().norm()) or 1.0  # a weight of zeros has a spectrum of zeros


def _leading(matrix: Tensor, exact_side: int) -> Tensor:
    shorter = min(matrix.shape)
    if shorter > exact_side:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = torch.svd_lowrank(matrix, q=min(shorter, LEADING + _OVERSAMPLING), niter=4)[1]
        return values[:LEADING].double()
    # The eigenvalues of the shorter side's Gram matrix: much cheaper than an SVD, and in float64 good to 1e-8 of the
    # largest singular value
    tall = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T).double()
    return torch.linalg.eigvalsh(tall.T @ tall).clamp(min=0).sqrt().flip(0)[:LEADING]
