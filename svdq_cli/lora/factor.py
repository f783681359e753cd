"""What an adapter adds to a weight, as the two factors that a branch can take in: exactly, or cut to a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.adapters.updates import LowRankUpdate, WeightChange, WholeUpdate
from svdq_cli.solve.low_rank import split_low_rank

APPROXIMATE_RANK = 64  # of what has no exact factors of so few ranks; LoHa of rank 8 has


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A change as low-rank factors. `error`: Frobenius norm of what they leave out over that of the change; None where
    they are exact."""

    update: LowRankUpdate
    error: float | None = None


def factored(
    change: WeightChange, weight: Callable[[], Tensor], *, strength: float, rank: int = APPROXIMATE_RANK
) -> Factored:
    """`strength` times a change. A plain LoRA keeps its factors whatever their rank; DoRA, whole differences, and LoHa
    or LoKr of a higher rank are cut to `rank` by SVD. `weight`: reads the layer's weight (N, K), on which DoRA depends.
    """
    match change:
        case LowRankUpdate() if change.kind == "LoRA" or change.rank <= rank:
            return Factored(replace(change, scale=change.scale * strength))
        case LowRankUpdate():
            added = change.added_to(change.up)
        case WholeUpdate():
            added = change.added.float()
        case _:
            added = change.added_to(weight())
    return _cut(strength * added, rank=rank, kind=change.kind)


def _cut(added: Tensor, *, rank: int, kind: str) -> Factored:
    up, down = split_low_rank(added, rank=min(rank, *added.shape), seed=0)
    error = float((added - up @ down).norm() / added.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return Factored(LowRankUpdate(down, up, 1.0, kind=kind), error)
