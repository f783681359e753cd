"""Low-rank updates joined to the branches of layers that share a down projection: ranks are put side by side.

The branch reads the raw activation, as a LoRA does, so no smoothing factor is involved and the sum is exact but for the
16 bits of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.adapters.updates import LowRankUpdate
from svdq_cli.checkpoint.lossless import same_bits
from svdq_cli.formats.contract import Branch

RANK_TILE = 16  # kernels read ranks in tiles of this many

Branches = Mapping[str, Branch]  # by layer, all with one down projection
Updates = Mapping[str, LowRankUpdate]  # by layer: what one adapter does to them


@dataclass(frozen=True, slots=True, eq=False)
class Addition:
    """Ranks to be put next to those of a group's branches. A layer without an `up` takes no part in them."""

    down: Tensor  # (R, K)
    ups: Mapping[str, Tensor]  # by layer, (N, R)


def additions(adapters: Sequence[Updates], dtype: torch.dtype) -> list[Addition]:
    """What adapters add to a group of layers, in the dtype of its branches.

    An adapter whose layers have one down matrix in common (a fused q, k, v; a single layer) takes its own rank; else
    each of its layers takes ranks of its own.
    """
    found: list[Addition] = []
    for updates in adapters:
        scaled = {name: _at_16_bits(update, dtype) for name, update in updates.items()}
        first = next(iter(scaled.values()), None)
        if first is not None and all(same_bits(branch.down, first.down) for branch in scaled.values()):
            found.append(Addition(first.down, {name: branch.up for name, branch in scaled.items()}))
        else:
            found += [Addition(branch.down, {name: branch.up}) for name, branch in scaled.items()]
    return found


def extended(branches: Branches, added: Sequence[Addition]) -> dict[str, Branch]:
    """The branches of a group of layers with more ranks."""
    base = next(iter(branches.values())).down
    down = torch.cat([base, *(addition.down for addition in added)])
    return {
        name: Branch(down, torch.cat([branch.up, *(_up_in(addition, name, branch) for addition in added)], 1))
        for name, branch in branches.items()
    }


def compressed(branches: Branches, *, rank: int) -> tuple[dict[str, Branch], float]:
    """A group's branches cut to a rank by SVD of their joint product, and what that leaves out: Frobenius norm of the
    error over that of the product. Unchanged, with error 0, where they have no more ranks than that."""
    first = next(iter(branches.values()))
    if first.rank <= rank:
        return dict(branches), 0.0
    up = torch.cat([branch.up for branch in branches.values()]).float()
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(first.down.float().T)
    inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.T)
    error = float(values[rank:].norm() / values.norm().clamp(min=torch.finfo(torch.float32).tiny))
    root = values[:rank].sqrt()  # shared evenly, so that neither factor loses more than the other at 16 bits
    down = (root.unsqueeze(1) * (right @ inner_right[:rank].T).T).to(first.down.dtype)
    ups = ((left @ inner_left[:, :rank]) * root).to(first.up.dtype)
    sizes = [len(branch.up) for branch in branches.values()]
    return {name: Branch(down, part) for name, part in zip(branches, ups.split(sizes), strict=True)}, error


def padded(branches: Branches, *, rank: int) -> dict[str, Branch]:
    """The branches at a rank that is not below theirs: further ranks are zero."""
    return {name: _padded(branch, rank - branch.rank) for name, branch in branches.items()}


def whole_tiles(rank: int) -> int:
    """The next multiple of `RANK_TILE`."""
    return math.ceil(rank / RANK_TILE) * RANK_TILE


def _up_in(addition: Addition, name: str, branch: Branch) -> Tensor:
    up = addition.ups.get(name)
    return branch.up.new_zeros(len(branch.up), len(addition.down)) if up is None else up


def _at_16_bits(update: LowRankUpdate, dtype: torch.dtype) -> Branch:
    """alpha / rank and the strength go into `down`. float16 ends at 6e-5, and what a LoRA's `up` holds may be smaller:
    there a power of two moves from one factor to the other until both are of one size."""
    down, up = update.down.float() * update.scale, update.up.float()
    if dtype == torch.float16:
        sizes = torch.stack([down.abs().amax(), up.abs().amax()]).clamp(min=torch.finfo(torch.float32).tiny)
        exponents = torch.log2(sizes)
        moved = 2.0 ** float(((exponents[0] - exponents[1]) / 2).round())
        down, up = down / moved, up * moved
    return Branch(down.to(dtype), up.to(dtype))


def _padded(branch: Branch, more: int) -> Branch:
    return Branch(
        torch.cat([branch.down, branch.down.new_zeros(more, branch.down.shape[1])]),
        torch.cat([branch.up, branch.up.new_zeros(len(branch.up), more)], dim=1),
    )
