"""Every converted layer against its 16-bit reference, on activations of held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor, nn

from svdq_cli.calibration.collect import collect_stats
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.evaluation.layers import Moved, layer_sqnr_db
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.plan import plan_model
from svdq_cli.planning.structure import shared_input
from svdq_cli.records import Int4, Observer, SharedInput
from svdq_cli.reports import LayerSqnr
from svdq_cli.source import Source, read_tensor
from svdq_cli.storage.atomic import whole_file
from svdq_cli.storage.tensor_file import save_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ROWS = 1024  # held-out rows per layer input
_KEPT = "judged"  # key of the safetensors metadata


@dataclass(frozen=True, slots=True, eq=False)
class JudgedLayers:
    """What became of the converted layers, and what they read meanwhile."""

    checkpoint: Checkpoint
    source: Source  # the 16-bit model
    sqnr: LayerSqnr
    inputs: tuple[SharedInput, ...]  # cover all converted layers
    abs_max: Mapping[str, Tensor]  # by shared input: (K,) float32, per channel


def judge_layers(
    pipe: DiffusionPipeline,
    model: nn.Module,
    checkpoint: Checkpoint,
    source: Source,
    prompts: Sequence[str],
    settings: SamplingSettings,
    observe: Observer,
) -> JudgedLayers:
    """`model`: the 16-bit denoiser of `pipe`, read from `source`."""
    inputs = _shared_inputs(checkpoint, source)
    stats = collect_stats(pipe, model, inputs, prompts, sampling=settings, rows=ROWS, observe=observe)
    per_layer: dict[str, float] = {}
    plans = checkpoint.by_name
    stored, means = checkpoint.stored_biases(source), checkpoint.means()
    for shared in inputs:
        for name in shared.layers:
            weight = read_tensor(source, f"{name}.weight").flatten(1)
            bias = read_tensor(source, f"{name}.bias") if plans[name].linear.bias else None
            solution = checkpoint.solution(plans[name])
            moved = moved_of(stored, means, name) if stored.moved else None
            found = layer_sqnr_db(weight, bias, solution, stats[shared.name].rows, moved=moved)
            per_layer[name] = round(found, 3)
    abs_max = {name: found.abs_max for name, found in stats.items()}
    return JudgedLayers(checkpoint, source, _summary(per_layer), inputs, abs_max)


def moved_of(stored: Source, means: Mapping[str, Tensor], name: str) -> Moved:
    """The mean that was moved out of one layer's input, and its bias. `stored`: the model with the biases of the
    conversion; `means`: of its layers' inputs."""
    bias = f"{name}.bias"
    return Moved(means.get(name), read_tensor(stored, bias) if bias in stored.tensors else None)


def keep_layers(path: Path, judged: JudgedLayers, *, prompts: int) -> None:
    """Write the layer SQNR found with that many prompts, for a run that resumes later."""
    said = {"prompts": prompts, "sqnr_db": dict(judged.sqnr.per_layer)}
    with whole_file(path) as partial:
        save_tensors(partial, judged.abs_max, {_KEPT: json.dumps(said)})


def kept_layers(path: Path, checkpoint: Checkpoint, source: Source, *, prompts: int) -> JudgedLayers | None:
    """What `keep_layers` wrote with as many prompts; None where that is not there. The caller knows that the file
    is of this checkpoint and source."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()[_KEPT])
        abs_max = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    if said["prompts"] != prompts:
        return None
    sqnr = _summary(said["sqnr_db"])
    return JudgedLayers(checkpoint, source, sqnr, _shared_inputs(checkpoint, source), abs_max)


def _summary(per_layer: Mapping[str, float]) -> LayerSqnr:
    return LayerSqnr(sum(per_layer.values()) / len(per_layer), min(per_layer.values()), per_layer)


def _shared_inputs(checkpoint: Checkpoint, source: Source) -> tuple[SharedInput, ...]:
    """What the converted layers read, as the family says; layers that a recipe's rules added are taken alone."""
    converted = {plan.name for plan in checkpoint.layers}
    plan = plan_model(
        source,
        precision=checkpoint.precision or Int4(),
        rank=checkpoint.rank or 16,
        family=checkpoint.family,
        supports=lambda layer: None if layer.name in converted else "kept in this checkpoint",
    )
    covered = {name for shared in plan.inputs for name in shared.layers}
    added = (shared_input([layer.name]) for layer in checkpoint.layers if layer.name not in covered)
    return (*plan.inputs, *added)
