"""What adapters add to a weight. LoRA, LoHa and LoKr are low-rank products, and are kept as their factors; DoRA also
sets the length of every row, so that what it adds depends on the weight.

Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353 (eq. 5); LoHa, arXiv 2108.06098 (Hadamard product of two
low-rank products); LoKr, arXiv 2212.10650 and LyCORIS, arXiv 2309.14859 (Kronecker product).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """scale * up @ down, computed in float32. `scale` is alpha / rank, without the strength that a user gives."""

    down: Tensor  # (R, K)
    up: Tensor  # (N, R)
    scale: float
    kind: str = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def of_rows(self, ranges: Ranges) -> LowRankUpdate:
        """What is added to these rows of the weight, in this order."""
        return replace(self, up=torch.cat([self.up[start:stop] for start, stop in ranges]))

    def added_to(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (N, K): (N, K) float32. It does not depend on the weight."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True, slots=True, eq=False)
class DoraUpdate:
    """The weight plus a low-rank update, every row scaled to a trained length."""

    direction: LowRankUpdate
    magnitude: Tensor  # (N,)

    @property
    def kind(self) -> str:
        return "DoRA" if self.direction.kind == "LoRA" else f"DoRA over {self.direction.kind}"

    @property
    def rank(self) -> int:
        return self.direction.rank

    def of_rows(self, ranges: Ranges) -> DoraUpdate:
        """What is added to these rows of the weight, in this order."""
        magnitude = torch.cat([self.magnitude[start:stop] for start, stop in ranges])
        return DoraUpdate(self.direction.of_rows(ranges), magnitude)

    def added_to(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (N, K) at full strength: (N, K) float32."""
        before = weight.float()
        turned = before + self.direction.added_to(before)
        length = turned.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return turned * (self.magnitude.float() / length).unsqueeze(1) - before


WeightChange = LowRankUpdate | DoraUpdate


def hadamard_update(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, scale: float
) -> LowRankUpdate:
    """LoHa: (a1 @ b1) * (a2 @ b2) elementwise, with pairs (a (N, R), b (R, K)), as factors of rank R1 * R2.

    Row n of `up` is the outer product of the rows n of a1 and a2, column k of `down` that of the columns of b1, b2.
    """
    (a1, b1), (a2, b2) = ((a.float(), b.float()) for a, b in (first, second))
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    down = (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
    return LowRankUpdate(down, up, scale, kind="LoHa")


def kronecker_update(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, scale: float
) -> LowRankUpdate:
    """LoKr: kron(a1 @ b1, a2 @ b2), with pairs (a (rows, R), b (R, columns)), as factors of rank R1 * R2."""
    (a1, b1), (a2, b2) = ((a.float(), b.float()) for a, b in (first, second))
    return LowRankUpdate(torch.kron(b1, b2), torch.kron(a1, a2), scale, kind="LoKr")


def as_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A whole matrix as (a, b) with a @ b = matrix and as few ranks as its shape needs."""
    rows, columns = matrix.shape
    if rows < columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)
