"""Where a LoRA acts in a loaded model: on a layer's branch, next to a layer, or on a 16-bit tensor.

A place keeps what was there. `prepared` computes what the LoRAs make of it and changes nothing; what it returns puts
that in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from svdq_cli.adapters.updates import LowRankUpdate, WeightChange
from svdq_cli.errors import UsageError
from svdq_cli.formats.contract import Branch
from svdq_cli.formats.tiled import MAX_RANK
from svdq_cli.lora.branch_ops import additions, extended, padded, whole_tiles
from svdq_cli.runtime.adapted import AdaptedLinear
from svdq_cli.runtime.linear import RunningBranch


@dataclass(frozen=True, slots=True, eq=False)
class LoadedLora:
    """A LoRA at full strength. `updates`: by converted layer; `changes`: by 16-bit weight; `vectors`: by
    bias, or weight of a norm."""

    updates: Mapping[str, LowRankUpdate]
    changes: Mapping[str, WeightChange]
    vectors: Mapping[str, Tensor]


Active = Sequence[tuple[LoadedLora, float]]  # with their strengths


class Place(Protocol):
    def prepared(self, active: Active) -> Callable[[], None]: ...


class LayerWithBranch(Protocol):
    """A converted W4A4 layer of any backend."""

    @property
    def branch(self) -> RunningBranch: ...
    def set_branch(self, branch: RunningBranch) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class BranchPlace:
    """A W4A4 layer: the LoRAs' ranks are next to those of its own branch. `base` is in main memory."""

    name: str
    layer: LayerWithBranch
    base: RunningBranch

    def prepared(self, active: Active) -> Callable[[], None]:
        device = self.layer.branch.up.device
        joined = _joined(self.name, self.base, active)
        rank = whole_tiles(joined.down.shape[0])
        if rank > MAX_RANK:
            raise UsageError(
                f"{self.name}: its branch would have rank {rank}, but the kernels read {MAX_RANK} at most",
                hint="use fewer LoRAs at once, or fold them with svdq lora --max-rank",
                where=self.name,
            )
        if joined is not self.base:
            whole = padded({self.name: Branch(joined.down, joined.up)}, rank=rank)[self.name]
            joined = RunningBranch(whole.down, whole.up, joined.bias)
        return lambda: self.layer.set_branch(on_device(joined, device))


@dataclass(frozen=True, slots=True, eq=False)
class BesidePlace:
    """A W4A16 layer, which has no branch: the LoRAs get a module around it."""

    name: str
    parent: nn.Module
    leaf: str
    layer: nn.Module
    empty: RunningBranch  # of rank 0, without a bias: the layer's own stays in the layer

    def prepared(self, active: Active) -> Callable[[], None]:
        joined = _joined(self.name, self.empty, active)
        device = next(self.layer.buffers()).device
        adapted = joined is not self.empty
        module = AdaptedLinear(self.layer, on_device(joined, device)) if adapted else self.layer
        return lambda: setattr(self.parent, self.leaf, module)


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlace:
    """A 16-bit weight or bias: the LoRAs are added to it."""

    name: str
    parent: nn.Module
    leaf: str
    base: nn.Parameter

    def prepared(self, active: Active) -> Callable[[], None]:
        if self.base.is_meta:
            raise UsageError(
                f"{self.name}: its weights were moved away by enable_sequential_cpu_offload",
                hint="set LoRAs before offloading; pipe.remove_all_hooks() undoes the offloading",
                where=self.name,
            )
        before = self.base.detach().float()
        added = torch.zeros_like(before)
        found = False
        for lora, strength in active:
            if (change := lora.changes.get(self.name)) is not None:
                rows = before.flatten(1).cpu()
                added += (strength * change.added_to(rows)).reshape(before.shape).to(before.device)
                found = True
            elif (vector := lora.vectors.get(self.name)) is not None:
                added += strength * vector.to(before.device)
                found = True
        changed = (before + added).to(self.base.dtype)
        parameter = nn.Parameter(changed, requires_grad=False) if found else self.base
        return lambda: setattr(self.parent, self.leaf, parameter)


def _joined(name: str, base: RunningBranch, active: Active) -> RunningBranch:
    """A branch with the LoRAs that touch the layer; `base` itself where none does."""
    dtype = base.up.dtype
    updates = [
        {name: replace(lora.updates[name], scale=lora.updates[name].scale * strength)}
        for lora, strength in active
        if name in lora.updates
    ]
    key = f"{name}.bias"
    biases = [strength * lora.vectors[key] for lora, strength in active if key in lora.vectors]
    if not updates and not biases:
        return base
    bias = base.bias
    for added in biases:
        bias = added if bias is None else bias.float() + added
    joined = extended({name: Branch(base.down, base.up)}, additions(updates, dtype))[name]
    return RunningBranch(joined.down, joined.up, None if bias is None else bias.to(dtype))


def on_device(branch: RunningBranch, device: torch.device) -> RunningBranch:
    """The branch with its tensors on a device."""
    bias = None if branch.bias is None else branch.bias.to(device)
    return RunningBranch(branch.down.to(device), branch.up.to(device), bias)
