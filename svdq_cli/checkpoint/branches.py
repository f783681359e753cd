"""Low-rank branches between the layers of a model and the modules of a file: `assembly`, for the branch alone.

So a branch is read and changed without touching a module's codes. Row orders, padding and the ranks that stacked
branches take are here, for `assembly` too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.checkpoint.file_layout import TILE, StoredModule
from svdq_cli.checkpoint.lossless import block_diagonal, same_bits, take_rows
from svdq_cli.checkpoint.row_orders import row_sources
from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts.layout import Interleaved
from svdq_cli.formats.contract import Branch
from svdq_cli.pack.padding import pad
from svdq_cli.records import LayerPlan, SharedInput, W4A4Plan


class HasBranch(Protocol):
    """A `Branch`, or a solution that has one."""

    @property
    def down(self) -> Tensor:
        """(R, K) in the layer's own order."""
        ...

    @property
    def up(self) -> Tensor:
        """(N, R) in the layer's own order."""
        ...


def join_branches(module: StoredModule, branches: Mapping[str, Branch]) -> Branch:
    """The branch that a module stores, of the branches of its layers by name.

    UsageError where layers that the module gives one down projection have two.
    """
    parts = {layer.name: branches[layer.name] for layer in module.layers}
    if module.pads:
        parts = {name: _padded(part) for name, part in parts.items()}
    joined = stacked_branches(module, parts)
    down = joined.down if module.columns is None else joined.down[:, slice(*module.columns)]
    indices = stored_rows(module)
    return Branch(down.contiguous(), joined.up if indices is None else take_rows(joined.up, indices))


def take_branch(layer: LayerPlan, parts: list[tuple[StoredModule, Branch]]) -> Branch:
    """A layer's branch from those of the modules that hold it, in the order of its columns. The inverse of
    `join_branches`."""
    found = [_part(layer, module, stored) for module, stored in parts]
    return columns_joined(layer, found)


def stacked_branches(module: StoredModule, parts: Mapping[str, HasBranch]) -> Branch:
    """(R, K) and (N, R). Branches with down projections of their own are concatenated along R, and block-diagonal in
    N."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for branch in module.branches:
        first, *others = branch
        for other in others:
            if not same_bits(parts[other.name].down, parts[first.name].down):
                raise not_together(module, first.name, other.name, "low-rank down projections")
        downs.append(parts[first.name].down)
        ups.append(torch.cat([parts[layer.name].up for layer in branch]))
    return Branch(torch.cat(downs), ups[0] if len(ups) == 1 else block_diagonal(ups))


def columns_joined(layer: LayerPlan, parts: list[Branch]) -> Branch:
    """One layer's branch from the parts of its columns. Parts share `up`, or have branches of their own."""
    if len(parts) == 1:
        return parts[0]
    ups, downs = [part.up for part in parts], [part.down for part in parts]
    if isinstance(layer, W4A4Plan) and layer.rank == sum(len(down) for down in downs):
        return Branch(block_diagonal(downs), torch.cat(ups, dim=1))
    if all(same_bits(up, ups[0]) for up in ups[1:]):
        return Branch(torch.cat(downs, dim=1), ups[0])
    raise InputError(f"{layer.name}: its two stored parts have different low-rank branches", where=layer.name)


def cut_branch(layer: LayerPlan, module: StoredModule, stored: HasBranch) -> Branch:
    """A layer's share of a module's branch, whose rows are in stacked order. InputError where it is mixed with that of
    another."""
    rows, width = rows_of(layer, module), width_of(layer, module)
    ranks = _rank_slice(layer, module)
    strangers = stored.up[rows].clone()
    strangers[:, ranks] = 0
    if bool((strangers != 0).any()):
        raise InputError(f"{module.name}: proj_up mixes the branches of its layers", where=module.name)
    return Branch(stored.down[ranks, :width].contiguous(), stored.up[rows, ranks].contiguous())


# ---------------------------------------------------------------------------------------------------- places


def rows_of(layer: LayerPlan, module: StoredModule) -> slice:
    """The layer's rows in a module in stacked order, without padding."""
    start = sum(module.rows_of(other) for other in module.layers[: module.layers.index(layer)])
    return slice(start, start + layer.linear.out_features)


def width_of(layer: LayerPlan, module: StoredModule) -> int:
    """How many of the layer's columns the module holds, without padding."""
    return layer.linear.in_features if module.columns is None else module.columns[1] - module.columns[0]


def stored_rows(module: StoredModule) -> Tensor | None:
    """The stacked row of each stored row; None where none moves. (sum of N,) integers."""
    rows = module.plan.linear.out_features
    # what pads the layer as a whole is not a part of its interleaved blocks, and stays behind them
    true_rows = sum(layer.linear.out_features for layer in module.layers)
    ordered = true_rows if isinstance(module.order, Interleaved) else rows
    sources = row_sources(module.order, ordered)
    return None if sources is None else torch.tensor([*sources, *range(ordered, rows)], dtype=torch.int64)


def inverse(indices: Tensor) -> Tensor:
    """The permutation that undoes another. Both are (N,) integers."""
    return torch.argsort(indices)


def not_together(module: StoredModule, one: str, other: str, what: str) -> UsageError:
    return UsageError(
        f"{module.name} stores {one} and {other} as one matrix, but their {what} differ",
        hint="convert the model again with this format among the outputs, and without share_branches: false",
        where=other,
        kind="not-exact",
    )


def require_solved_together(module: StoredModule, inputs: Sequence[SharedInput]) -> None:
    """UsageError where layers that the module stacks will be solved apart, so that what it has one of differs.

    `inputs`: of the plan; those of a checkpoint are not known, and there the numbers themselves tell.
    """
    if not inputs or len(module.layers) < 2 or not isinstance(module.plan, W4A4Plan):
        return
    first, *others = (layer.name for layer in module.layers)
    together = next((shared for shared in inputs if first in shared.layers), None)
    for other in others:
        if together is None or other not in together.layers:
            raise _apart(
                module, first, other, "a rule under layers (group, include or skip) solves them apart"
            )
    if not module.plan.rank:
        return
    for part in module.branches:
        branch = next(each for each in together.branches if part[0].name in each) if together else ()
        for layer in part:
            if layer.name not in branch:
                raise _apart(module, part[0].name, layer.name, "share_branches is false")


def _apart(module: StoredModule, one: str, other: str, why: str) -> UsageError:
    return UsageError(
        f"{module.name} stores {one} and {other} as one matrix, but {why}",
        hint="drop that, or choose a format that stores every layer by itself, such as nunchaku-lite",
        where=other,
        kind="not-exact",
    )


def _part(layer: LayerPlan, module: StoredModule, stored: Branch) -> Branch:
    indices = stored_rows(module)
    up = stored.up if indices is None else take_rows(stored.up, inverse(indices))
    return cut_branch(layer, module, Branch(stored.down, up))


def _padded(branch: Branch) -> Branch:
    """Grown to whole tiles, with zeros."""
    return Branch(
        down=pad(branch.down, multiples=(1, TILE), fill=0), up=pad(branch.up, multiples=(TILE, 1), fill=0)
    )


def _rank_slice(layer: LayerPlan, module: StoredModule) -> slice:
    if len(module.branches) == 1:
        return slice(None)
    start = 0
    for branch in module.branches:
        rank = branch[0].rank if isinstance(branch[0], W4A4Plan) else 0
        if layer in branch:
            return slice(start, start + rank)
        start += rank
    raise ValueError(f"{layer.name} is not in {module.name}")
