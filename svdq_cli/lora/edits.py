"""Which LoRA changes what of a checkpoint, before a number is read: branches of W4A4 layers, and 16-bit tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from svdq_cli.adapters.changes import StoredChange, WeightRows
from svdq_cli.adapters.denoiser import LoraFile, read_lora
from svdq_cli.adapters.fitting import AdaptedLayer
from svdq_cli.adapters.names import ModelShapes, part_of
from svdq_cli.adapters.read import Adapter
from svdq_cli.adapters.updates import WeightChange
from svdq_cli.checkpoint.reader import Checkpoint, layer_of
from svdq_cli.errors import InputError, UsageError
from svdq_cli.lora.weights import CheckpointWeights, require_same_base
from svdq_cli.records import W4A4Plan, W4A16Plan
from svdq_cli.reports import LoraFacts, LoraKey
from svdq_cli.source import file_sha256

# What becomes of a W4A16 layer that a LoRA changes: a 16-bit layer, what it was, or a layer with a branch of its own
W4A16Choice = Literal["dense", "skip", "branch"]


@dataclass(frozen=True, slots=True)
class GivenLora:
    """A LoRA and the weight that it was given."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one LoRA does to one tensor, at full strength."""

    lora: GivenLora
    change: StoredChange
    weights: WeightRows  # of the checkpoint

    def read(self) -> WeightChange:
        return self.change.read(self.weights)


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """What changes. All names are the model's."""

    branches: Mapping[str, Sequence[Contribution]]  # by W4A4 layer
    weights: Mapping[str, Sequence[Contribution]]  # by tensor that is, or becomes, a 16-bit one
    vectors: Mapping[str, Tensor]  # by bias, and by weight of a norm: (N,) float32, strength included
    dense: frozenset[str]  # W4A16 layers that become 16-bit ones
    skipped: frozenset[str]  # W4A16 layers that stay as they are


def lora_facts(file: Path, weight: float, component: str | None) -> LoraFacts:
    """What a report says of a LoRA: its file as an absolute path, its strength, its digest and its denoiser."""
    return LoraFacts(str(file.absolute()), weight, file_sha256(file), component)


def read_loras(checkpoint: Checkpoint, loras: Sequence[LoraFile]) -> tuple[GivenLora, ...]:
    """The LoRAs that a checkpoint's model is to take. Raises as `read_lora` does."""
    if not loras:
        raise UsageError("no LoRA is named", hint="give --lora FILE or --lora FILE:WEIGHT")
    if not checkpoint.format.has_branch:
        raise UsageError(
            f"{checkpoint.source.path}: {checkpoint.format.name} has no low-rank branch to fold a LoRA into",
            hint="merge it when converting: svdq convert SOURCE --lora FILE",
            where=str(checkpoint.source.path),
        )
    first, *others = checkpoint.source.components
    model = ModelShapes(
        checkpoint.source.path, checkpoint.model_class, checkpoint.state, first, tuple(others)
    )
    return tuple(GivenLora(require_same_base(read_lora(lora, model)), lora.weight) for lora in loras)


def plan_edits(checkpoint: Checkpoint, loras: Sequence[GivenLora], *, w4a16: W4A16Choice) -> Edits:
    """Raises UsageError where the checkpoint's format has no place for what a LoRA changes."""
    plans = checkpoint.by_name
    branches: dict[str, list[Contribution]] = defaultdict(list)
    weights: dict[str, list[Contribution]] = defaultdict(list)
    vectors: dict[str, Tensor] = {}
    of_checkpoint = CheckpointWeights(checkpoint)
    modulations: set[str] = set()
    for lora in loras:
        if lora.weight == 0:
            continue
        for name, change in lora.adapter.weights.items():
            layer = name.removesuffix(".weight")
            if isinstance(plans.get(layer), W4A16Plan):
                modulations.add(layer)
            target, key = (branches, layer) if isinstance(plans.get(layer), W4A4Plan) else (weights, name)
            target[key].append(Contribution(lora, change, of_checkpoint))
        for name, added in lora.adapter.vectors.items():
            _require_vector(checkpoint, lora, name)
            vectors[name] = vectors.get(name, 0) + lora.weight * added
    skipped = frozenset(modulations if w4a16 == "skip" else ())
    if modulations and w4a16 == "dense" and not checkpoint.format.mixes:
        raise _no_place_for_modulation(checkpoint, min(modulations))
    return Edits(
        branches=dict(branches),
        weights={name: found for name, found in weights.items() if layer_of(name) not in skipped},
        vectors={name: added for name, added in vectors.items() if layer_of(name) not in skipped},
        dense=frozenset(modulations if w4a16 == "dense" else ()),
        skipped=skipped,
    )


def table_of(
    checkpoint: Checkpoint,
    loras: Sequence[GivenLora],
    edits: Edits,
    errors: Mapping[tuple[Path, str], float],
) -> tuple[LoraKey, ...]:
    """What became of every layer of every file. `errors`: by file and layer, what had to be cut to a rank."""
    planned = {plan.name for plan in checkpoint.layers if plan.name not in edits.dense}
    rows: list[LoraKey] = []
    for lora in loras:
        file = lora.adapter.path
        rows += [_row(lora, layer, planned, edits, errors) for layer in lora.adapter.layers]
        rows += [
            LoraKey(file.name, key, (), None, None, "not applicable", None, f"for the {part_of(key)}")
            for key in lora.adapter.left_out
        ]
    return tuple(rows)


def _row(
    lora: GivenLora,
    layer: AdaptedLayer,
    planned: set[str],
    edits: Edits,
    errors: Mapping[tuple[Path, str], float],
) -> LoraKey:
    names = tuple(dict.fromkeys(layer_of(name) for name in (*layer.weights, *layer.vectors)))
    file = lora.adapter.path
    why: str | None = None
    how = "applied" if planned.issuperset(names) and layer.weights else "merged"
    if lora.weight == 0:
        how, why = "not applicable", "its weight is 0"
    elif edits.skipped.intersection(names):
        how, why = "not applicable", "a W4A16 layer, left unchanged (--skip-w4a16)"
    elif edits.dense.intersection(names):
        why = "a W4A16 layer, which becomes a 16-bit layer"
    elif not planned.issuperset(names) and planned.intersection(names):
        why = "partly in 4-bit layers, partly in 16-bit ones"
    cut = [errors[file, name] for name in names if (file, name) in errors]
    return LoraKey(file.name, layer.name, names, layer.kind, layer.rank, how, max(cut, default=None), why)


def _require_vector(checkpoint: Checkpoint, lora: GivenLora, name: str) -> None:
    if name not in checkpoint.state:
        raise InputError(
            f"{lora.adapter.path}: it changes {name}, but the model has no bias there",
            hint="the LoRA was trained on a variant of the model",
            where=name,
            kind="lora-mismatch",
        )


def _no_place_for_modulation(checkpoint: Checkpoint, layer: str) -> UsageError:
    return UsageError(
        f"{layer}: a W4A16 layer, which has neither a branch nor a 16-bit form in {checkpoint.format.name}",
        hint="--skip-w4a16 leaves such layers unchanged and lists them; a nunchaku-lite checkpoint stores them at "
        "16 bits; --format nunchaku writes a LoRA file, in which they have a branch",
        where=layer,
        kind="not-exact",
    )
