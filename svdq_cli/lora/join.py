"""The branches of a checkpoint with LoRAs joined to them: what is added to each group of layers, and at which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from svdq_cli.adapters.updates import LowRankUpdate
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.errors import UsageError
from svdq_cli.formats.contract import Branch
from svdq_cli.formats.tiled import MAX_RANK
from svdq_cli.lora.branch_ops import (
    RANK_TILE,
    Addition,
    Updates,
    additions,
    compressed,
    extended,
    padded,
    whole_tiles,
)
from svdq_cli.lora.edits import Contribution, Edits
from svdq_cli.lora.factor import factored
from svdq_cli.records import W4A4Plan
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.source import by_component

Group = tuple[W4A4Plan, ...]  # layers with one down projection in the file


@dataclass(slots=True)
class JoinedBranches:
    """The branches that the new file holds. What LoRAs add is in memory at 16 bits, the rest is read when it is asked
    for."""

    checkpoint: Checkpoint
    max_rank: int | None
    groups: Mapping[str, Group]  # by layer
    updates: Mapping[str, Sequence[Updates]]  # by the first layer of a group, one for each LoRA
    added: Mapping[str, Sequence[Addition]]  # the same at 16 bits
    cut: Mapping[tuple[Path, str], float]  # by LoRA and layer: relative error of what had to be cut to a rank
    ranks: Mapping[str, int]  # by layer, in the new file
    layer_error: dict[str, float] = field(default_factory=dict[str, float])  # what `max_rank` cut off
    _latest: dict[str, Branch] = field(default_factory=dict[str, Branch])

    def __getitem__(self, layer: str) -> Branch:
        """A layer's new branch."""
        if layer not in self._latest:
            self._latest = self._of_group(self.groups[layer])
        return self._latest[layer]

    def is_changed(self, layer: str) -> bool:
        """Whether anything but zeros is added to a layer's branch."""
        return bool(self.added[self.groups[layer][0].name])

    def updates_of(self, layer: str) -> list[LowRankUpdate]:
        """What each LoRA that touches a layer does to it, strength included."""
        return [each[layer] for each in self.updates[self.groups[layer][0].name] if layer in each]

    def _of_group(self, group: Group) -> dict[str, Branch]:
        first = group[0].name
        branches = {layer.name: self.checkpoint.branch(layer) for layer in group}
        joined = extended(branches, self.added[first])
        if self.max_rank is not None and self.added[first]:
            joined, error = compressed(joined, rank=self.max_rank)
            self.layer_error |= dict.fromkeys(joined, error)
        return padded(joined, rank=self.ranks[first])


def join_loras(
    checkpoint: Checkpoint,
    edits: Edits,
    *,
    max_rank: int | None,
    approximate_rank: int,
    one_rank: bool,
) -> JoinedBranches:
    """What the LoRAs add to every group, and the ranks that follow. `one_rank`: all layers of a file, which holds one
    denoiser, get that of the widest.

    UsageError for ranks that no kernel reads.
    """
    _require_max_rank(checkpoint, max_rank)
    groups = groups_of(checkpoint)
    cut: dict[tuple[Path, str], float] = {}
    updates: dict[str, Sequence[Updates]] = {}
    for group in dict.fromkeys(groups.values()):
        updates[group[0].name] = _updates(checkpoint, group, edits, approximate_rank, cut)
    added = {name: additions(each, checkpoint.dtype) for name, each in updates.items()}
    ranks = {
        group[0].name: _new_rank(group[0].rank, added[group[0].name], max_rank)
        for group in dict.fromkeys(groups.values())
    }
    if one_rank:
        files = by_component(checkpoint.source.components, {name: name for name in ranks}).values()
        ranks = {name: max(ranks[each] for each in file.values()) for file in files for name in file.values()}
    _require_rank(ranks)
    by_layer = {name: ranks[group[0].name] for name, group in groups.items()}
    return JoinedBranches(checkpoint, max_rank, groups, updates, added, cut, by_layer)


def groups_of(checkpoint: Checkpoint) -> dict[str, Group]:
    """Every W4A4 layer with those that share its down projection in the file."""
    groups: dict[str, Group] = {}
    for module in checkpoint.file.modules:
        for branch in module.branches:
            group = tuple(layer for layer in branch if isinstance(layer, W4A4Plan))
            groups |= {layer.name: group for layer in group}
    return groups


def _updates(
    checkpoint: Checkpoint,
    group: Group,
    edits: Edits,
    rank: int,
    cut: dict[tuple[Path, str], float],
) -> list[Updates]:
    """What each LoRA does to the layers of a group, in the order in which the LoRAs were given."""
    by_lora: dict[int, dict[str, LowRankUpdate]] = {}
    for layer in group:
        for part in edits.branches.get(layer.name, ()):
            update, error = _factors(checkpoint, layer, part, rank)
            by_lora.setdefault(id(part.lora), {})[layer.name] = update
            if error is not None:
                cut[part.lora.adapter.path, layer.name] = error
    return list(by_lora.values())


def _factors(
    checkpoint: Checkpoint, layer: W4A4Plan, part: Contribution, rank: int
) -> tuple[LowRankUpdate, float | None]:
    found = factored(
        part.read(),
        lambda: rebuilt_weight(checkpoint.solution(layer)),
        strength=part.lora.weight,
        rank=rank,
    )
    return found.update, found.error


def _new_rank(before: int, added: Sequence[Addition], max_rank: int | None) -> int:
    if not added:
        return before
    rank = before + sum(len(addition.down) for addition in added)
    return whole_tiles(rank if max_rank is None else min(rank, max_rank))


def _require_max_rank(checkpoint: Checkpoint, max_rank: int | None) -> None:
    if max_rank is None:
        return
    before = max((plan.rank for plan in checkpoint.layers if isinstance(plan, W4A4Plan)), default=0)
    if max_rank % RANK_TILE or max_rank < before:
        raise UsageError(
            f"--max-rank {max_rank}: must be a multiple of {RANK_TILE}, and at least {before}, the rank of the "
            "checkpoint",
            hint=f"give --max-rank {whole_tiles(max(max_rank, before))}",
        )


def _require_rank(ranks: Mapping[str, int]) -> None:
    name, rank = max(ranks.items(), key=lambda item: item[1], default=("", 0))
    if rank > MAX_RANK:
        raise UsageError(
            f"{name}: its branch would have rank {rank}, but the runtimes read {MAX_RANK} at most",
            hint="--max-rank 128 compresses the branches by SVD and reports the error of every layer",
            where=name,
        )
