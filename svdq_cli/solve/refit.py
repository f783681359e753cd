"""After rounding, the low-rank branch is fitted once more to what the 4-bit part leaves over.

Ours. Reduced-rank regression (Izenman 1975) with a ridge that pulls toward the branch there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.solve.low_rank import low_rank_of

RIDGE = 0.1  # share of the mean second moment; between 0.05 and 0.3 the result hardly changes


@dataclass(frozen=True, slots=True, eq=False)
class RefitInputs:
    """The inputs of a layer group as its branches are refitted to them."""

    rows: Tensor  # (M, K), smoothed
    lost: Tensor  # (M, K): what the runtime's quantizer takes from them
    root: Tensor  # (K, K): the lower Cholesky factor of their damped second moment


def refit_inputs(rows: Tensor, quantized: Tensor) -> RefitInputs | None:
    """Of smoothed `rows` (M, K) and what the quantizer makes of them, `quantized`, whose memory is taken. None where
    they have no usable second moment."""
    gram = rows.T @ rows
    gram.diagonal().add_(_ridge(rows) * gram.diagonal().mean())
    root, failed = torch.linalg.cholesky_ex(gram)
    return None if int(failed) else RefitInputs(rows, torch.sub(rows, quantized, out=quantized), root)


def _ridge(rows: Tensor) -> float:
    """More than usual where there are fewer than ten rows a channel, or the branch fits chance."""
    return max(RIDGE, rows.shape[1] / len(rows))


def refit_branch(
    inputs: RefitInputs, weight: Tensor, four_bit: Tensor, up: Tensor, down: Tensor, *, seed: int
) -> tuple[Tensor, Tensor]:
    """A new (up (N, R), down (R, K)), in smoothed coordinates, for the codes that `four_bit` (N, K) represents next to
    the branch `up @ down` there is. `weight` (N, K): the smoothed 16-bit one, whose memory is taken.

    With rows X, what the layer's output lacks Y (M, N), and C = G G^T the damped second moment, minimizes
    |Y - X (B - down^T up^T)|^2 + ridge |B - down^T up^T|^2 over B (K, N) of rank R: the best B is G^-T times the
    truncated SVD of G^-1 (C down^T up^T + X^T Y).
    """
    left_over = weight.sub_(four_bit).addmm_(up, down, alpha=-1)
    target = _Target(inputs, left_over, four_bit, up, down)
    # The new branch is near the one there is, from which one step of subspace iteration is enough
    found = low_rank_of(target, rank=len(down), seed=seed, start=torch.linalg.qr(up).Q)
    return found.up, torch.linalg.solve_triangular(inputs.root.T, found.down.T, upper=True).T


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """The transposed matrix (N, K) whose truncated SVD is wanted. With few columns at a time it takes a fraction of
    what computing it would: Y alone is as large as all products of a forward pass."""

    inputs: RefitInputs
    left_over: Tensor  # (N, K): of the weight by codes and branch
    four_bit: Tensor  # (N, K)
    up: Tensor
    down: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.four_bit.shape

    @property
    def device(self) -> torch.device:
        return self.four_bit.device

    def times(self, columns: Tensor) -> Tensor:
        rows, lost, root = self.inputs.rows, self.inputs.lost, self.inputs.root
        seen = rows @ torch.linalg.solve_triangular(root.T, columns, upper=True)
        product = self.up @ (self.down @ (root @ columns))
        return product.addmm_(self.left_over, rows.T @ seen).addmm_(self.four_bit, lost.T @ seen)

    def transposed_times(self, columns: Tensor) -> Tensor:
        rows, lost, root = self.inputs.rows, self.inputs.lost, self.inputs.root
        lacks = (lost @ (self.four_bit.T @ columns)).addmm_(rows, self.left_over.T @ columns)
        product = root.T @ (self.down.T @ (self.up.T @ columns))
        return product.add_(torch.linalg.solve_triangular(root, rows.T @ lacks, upper=False))
