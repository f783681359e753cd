"""What LoRAs add to biases where a conversion moved the means of inputs into them.

A LoRA was trained on x, and its layer now reads x - mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.adapters.updates import LowRankUpdate
from svdq_cli.checkpoint.reader import Checkpoint, layer_of
from svdq_cli.errors import UsageError
from svdq_cli.lora.edits import Edits
from svdq_cli.lora.join import JoinedBranches


def of_mean(update: LowRankUpdate, mean: Tensor) -> Tensor:
    """What an update gives (N,) for the mean (K,) of an input."""
    return update.scale * (update.up.float() @ (update.down.float() @ mean))


def with_means(checkpoint: Checkpoint, edits: Edits, joined: JoinedBranches) -> Edits:
    """The edits with what they add to the biases of layers whose inputs have lost their means."""
    means = checkpoint.means()
    vectors: dict[str, Tensor] = dict(edits.vectors)

    def add(layer: str, added: Tensor) -> None:
        name = f"{layer}.bias"
        vectors[name] = vectors.get(name, torch.zeros((), dtype=torch.float32)) + added

    for layer in means.keys() & edits.branches.keys():
        for update in joined.updates_of(layer):
            add(layer, of_mean(update, means[layer]))
    for name, parts in edits.weights.items():
        if (mean := means.get(layer_of(name))) is not None:
            before = checkpoint.kept_tensor(name).float().flatten(1)
            for part in parts:
                add(layer_of(name), part.lora.weight * (part.read().added_to(before) @ mean))
    return replace(edits, vectors=vectors)


def require_no_means(checkpoint: Checkpoint, edits: Edits) -> None:
    """UsageError where LoRAs change layers whose inputs have lost their means, for what has no place for a bias."""
    touched = {*edits.branches, *map(layer_of, edits.weights)} & checkpoint.means().keys()
    if touched:
        raise UsageError(
            f"{min(touched)}: the base holds the mean of this layer's input in its bias, but a LoRA file has no "
            "bias to "
            "hold the LoRA's part of it",
            hint="leave --format out to fold the LoRA into the checkpoint, or convert the base with a recipe whose "
            "search leaves out means",
            where=min(touched),
            kind="not-exact",
        )


def vectors_of_means(updates: Mapping[str, LowRankUpdate], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vector that a LoRA at full strength adds to each bias, by bias. `updates`, `means`: by layer."""
    return {f"{name}.bias": of_mean(updates[name], means[name]) for name in updates.keys() & means.keys()}
