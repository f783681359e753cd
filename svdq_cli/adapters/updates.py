"""What adapters add to a weight. LoRA, LoHa and LoKr are low-rank products, and are kept as their factors; DoRA also
sets the length of every row or column, so that what it adds depends on the weight.

Sources: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353 (eq. 5); LoHa, arXiv 2108.06098 (Hadamard product of two
low-rank products); LoKr, arXiv 2212.10650 and LyCORIS, arXiv 2309.14859 (Kronecker product).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]

_LARGEST_KERNEL = 7**3  # numbers


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
        return _dora_kind(self.direction)

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
        factor = _over(self.magnitude, turned.norm(dim=1))
        return turned * factor.unsqueeze(1) - before


@dataclass(frozen=True, slots=True, eq=False)
class ColumnDoraUpdate:
    """The weight plus a low-rank update, every input's numbers scaled to a trained length. The lengths are of whole
    columns, so that a few rows can only be changed once the whole weight was seen (`measured`)."""

    direction: LowRankUpdate
    magnitude: Tensor  # (C,); a convolution's input channel has K / C columns
    lengths: Tensor | None = None  # (C,) float32, of the weight plus the update

    @property
    def kind(self) -> str:
        return f"{_dora_kind(self.direction)} by columns"

    @property
    def rank(self) -> int:
        return self.direction.rank

    def of_rows(self, ranges: Ranges) -> ColumnDoraUpdate:
        """What is added to these rows of the weight, in this order."""
        return replace(self, direction=self.direction.of_rows(ranges))

    def measured(self, blocks: Iterable[tuple[Ranges, Tensor]]) -> ColumnDoraUpdate:
        """The update with the lengths of all columns. `blocks`: every row of the weight once, as the ranges of rows
        that are read together and their numbers (n, K)."""
        squares = torch.zeros(len(self.magnitude), dtype=torch.float64)
        for ranges, rows in blocks:
            turned = rows.float() + self.direction.of_rows(ranges).added_to(rows)
            squares += turned.double().square().reshape(len(turned), len(squares), -1).sum(dim=(0, 2))
        return replace(self, lengths=squares.sqrt().float())

    def added_to(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (N, K) at full strength: (N, K) float32. The update is `measured`."""
        assert self.lengths is not None
        before = weight.float()
        factor = _over(self.magnitude, self.lengths)
        turned = before + self.direction.added_to(before)
        return turned * factor.repeat_interleave(before.shape[1] // len(factor)) - before


@dataclass(frozen=True, slots=True, eq=False)
class WholeUpdate:
    """A difference of every number, as training the weight itself gives it."""

    added: Tensor  # (N, K)
    kind: str = "whole difference"

    @property
    def rank(self) -> None:
        return None

    def of_rows(self, ranges: Ranges) -> WholeUpdate:
        """What is added to these rows of the weight, in this order."""
        return replace(self, added=torch.cat([self.added[start:stop] for start, stop in ranges]))

    def added_to(self, weight: Tensor) -> Tensor:
        """What is added to `weight` (N, K): (N, K) float32. It does not depend on the weight."""
        return self.added.float()


WeightChange = LowRankUpdate | DoraUpdate | ColumnDoraUpdate | WholeUpdate


def without_first_ranks(update: LowRankUpdate, taken: LowRankUpdate) -> LowRankUpdate:
    """An update of a base from which `taken` was taken out, as an update of the base as it was."""
    up = torch.cat([update.scale * update.up.float(), -taken.scale * taken.up.float()], dim=1)
    down = torch.cat([update.down.float(), taken.down.float()])
    return LowRankUpdate(down, up, 1.0, kind=update.kind)


def principal_part(weight: Tensor, rank: int) -> LowRankUpdate:
    """What PiSSA takes out of a weight (N, K): its first `rank` singular components (arXiv 2404.02948, eq. 2 to 4)."""
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    return LowRankUpdate(right[:rank], left[:, :rank] * values[:rank], 1.0)


def orthonormal_part(weight: Tensor, rank: int) -> LowRankUpdate:
    """What OLoRA takes out of a weight (N, K), before its scale: the first `rank` columns of Q times rows of R
    (arXiv 2406.01775, algorithm 1)."""
    q, r = torch.linalg.qr(weight.float())
    return LowRankUpdate(r[:rank], q[:, :rank], 1.0)


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


def through_core(core: Tensor, down: Tensor) -> Tensor:
    """A convolution's down matrix from those of its Tucker decomposition (arXiv 2108.06098, proposition 3): `core`
    (R, R, kernel...) reads what `down` (R, C) makes of the channels. Returns (R, C * kernel) in float32.

    Raises ValueError for a kernel that no convolution has, RuntimeError where the ranks differ.
    """
    kernel = math.prod(core.shape[2:])
    if kernel > _LARGEST_KERNEL:
        raise ValueError(f"a Tucker core of shape {list(core.shape)}")
    return torch.einsum("ij...,jc->ic...", core.float(), down.float()).flatten(1).contiguous()


def as_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A whole matrix as (a, b) with a @ b = matrix and as few ranks as its shape needs. `matrix` is (N, K), a (N, R)
    and b (R, K)."""
    rows, columns = matrix.shape
    if rows < columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)


def _dora_kind(direction: LowRankUpdate) -> str:
    return "DoRA" if direction.kind == "LoRA" else f"DoRA over {direction.kind}"


def _over(trained: Tensor, lengths: Tensor) -> Tensor:
    """The factor that gives vectors of these lengths the trained ones; a vector of zeros has no direction to scale."""
    return trained.float() / lengths.clamp(min=torch.finfo(torch.float32).tiny)
