"""A checkpoint's weight file written again with some tensors changed, tensor by tensor: all others are copied as they
are, so that memory holds a layer at a time, whatever the size of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.checkpoint.assembly import join_layers, kept_tensor
from svdq_cli.checkpoint.biases import moved_biases
from svdq_cli.checkpoint.branches import join_branches
from svdq_cli.checkpoint.detect import specs_of_headers
from svdq_cli.checkpoint.file_layout import EMPTY, StoredModule, files_of, kept_shapes
from svdq_cli.checkpoint.reader import Checkpoint, layer_of
from svdq_cli.checkpoint.writer import Target, target_of
from svdq_cli.formats.headers import BIASES, RANKS, as_text, biases_text
from svdq_cli.lora.edits import Edits
from svdq_cli.lora.join import JoinedBranches
from svdq_cli.records import LayerPlan, LayerSolution, W4A4Plan
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.source import by_component
from svdq_cli.source.tensors import StoredTensor
from svdq_cli.storage.tensor_file import TensorSpec, write_tensors


def new_target(checkpoint: Checkpoint, edits: Edits, joined: JoinedBranches) -> Target:
    """The checkpoint's layout with the new ranks, and without the W4A16 layers that become 16-bit ones."""
    plan = checkpoint.plan()
    layers: list[LayerPlan] = []
    for layer in plan.layers:
        if isinstance(layer, W4A4Plan):
            layers.append(replace(layer, rank=joined.ranks[layer.name]))
        elif layer.name not in edits.dense:
            layers.append(layer)
    dense = tuple(layer.linear for layer in plan.w4a16 if layer.name in edits.dense)
    changed = replace(plan, layers=tuple(layers), kept=(*plan.kept, *dense))
    return target_of(checkpoint.format, changed, checkpoint.state, checkpoint.dtype)


def header_of(
    checkpoint: Checkpoint, target: Target, edits: Edits, before: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of a single file: what `before` says, with the new ranks and biases."""
    said = {
        **target.metadata(),
        RANKS: {layer.name: layer.rank for layer in target.plan.w4a4},
        BIASES: biases_text({**checkpoint.biases, **_new_moved_biases(checkpoint, edits)}),
    }
    return {**before, **as_text(said)}


def write_changed(
    path: Path,
    checkpoint: Checkpoint,
    component: str,
    target: Target,
    edits: Edits,
    joined: JoinedBranches,
    metadata: Mapping[str, str],
) -> None:
    """The new weight file of one denoiser at `path`. `target`: of that denoiser alone (`Target.denoisers`)."""
    specs = _specs(checkpoint, component, target)
    old = by_component(checkpoint.source.components, checkpoint.source.tensors)[component]
    with write_tensors(path, specs, metadata) as writer:
        for name, tensor in _changed_tensors(checkpoint, component, target, edits, joined):
            writer.write(name, tensor)
        for name in checkpoint.marker_names():
            writer.write(name, torch.empty(EMPTY.shape, dtype=EMPTY.dtype))
        for name in writer.missing:
            entry = old[name]
            assert isinstance(entry, StoredTensor)  # a checkpoint's tensors are read as they are stored
            writer.copy(name, entry.file, entry.offset)


def _changed_tensors(
    checkpoint: Checkpoint, component: str, target: Target, edits: Edits, joined: JoinedBranches
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of a denoiser that is not the old one, by stored name. Of any shape, as stored."""
    before = {
        module.name: module
        for module in files_of(checkpoint.file, checkpoint.source.components)[component].modules
    }
    for module in target.file.modules:
        yield from _changed_in_module(checkpoint, before[module.name], module, edits, joined)
    dtypes = _kept_dtypes(checkpoint, component)
    for name, kept in target.file.kept.items():
        if any(is_changed_tensor(source, edits) for source in kept.sources):
            parts = [new_tensor(checkpoint, source, edits) for source in kept.sources]
            yield name, kept_tensor(kept, parts).to(dtypes.get(name, checkpoint.dtype)).contiguous()


def is_changed_tensor(name: str, edits: Edits) -> bool:
    """Whether a 16-bit tensor of the model is another than it was, or was no 16-bit tensor."""
    return name in edits.weights or name in edits.vectors or layer_of(name) in edits.dense


def new_tensor(checkpoint: Checkpoint, name: str, edits: Edits) -> Tensor:
    """One of the model's tensors as the new file keeps it, before it is rounded to 16 bits. Of any shape, the model's
    own."""
    before = _sixteen_bit(checkpoint, name, edits).float()
    added = torch.zeros(before.shape, dtype=torch.float32)
    for part in edits.weights.get(name, ()):
        change = part.read().added_to(before.flatten(1))
        added += (part.lora.weight * change).reshape(before.shape)
    return before + added + edits.vectors.get(name, 0)


# ---------------------------------------------------------------------------------------------------- pieces


def _specs(checkpoint: Checkpoint, component: str, target: Target) -> dict[str, TensorSpec]:
    """Every tensor of a denoiser's new file. 16-bit tensors keep the dtype that they have."""
    dtypes = _kept_dtypes(checkpoint, component)
    specs = {
        f"{module.name}.{suffix}": TensorSpec(spec.shape, spec.dtype)
        for module in target.file.modules
        for suffix, spec in target.format.tensor_specs(module.plan, target.dtype, module.traits).items()
    }
    for name, shape in kept_shapes(target.file, checkpoint.state).items():
        specs[name] = TensorSpec(shape, dtypes.get(name, checkpoint.dtype))
    for name in checkpoint.marker_names():
        specs[name] = EMPTY
    return specs


def _kept_dtypes(checkpoint: Checkpoint, component: str) -> dict[str, torch.dtype]:
    """By stored name, the dtype of every tensor of a denoiser that is at 16 bits in the checkpoint. A quantized module
    may have a tensor of a name that its 16-bit weight has when it becomes one."""
    found, kept = specs_of_headers(checkpoint.source), checkpoint.kept_specs()
    dtypes = {name: spec.dtype for name, spec in found.items() if name in kept}
    return by_component(checkpoint.source.components, dtypes)[component]


def _changed_in_module(
    checkpoint: Checkpoint,
    before: StoredModule,
    module: StoredModule,
    edits: Edits,
    joined: JoinedBranches,
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(module.plan, W4A4Plan):
        names = [layer.name for layer in module.layers]
        if module.plan != before.plan or any(joined.is_changed(name) for name in names):
            stored = join_branches(module, {name: joined[name] for name in names})
            for suffix, tensor in checkpoint.format.encode_branch(stored, module.traits).items():
                yield f"{module.name}.{suffix}", tensor.contiguous()
    if any(f"{layer.name}.bias" in edits.vectors for layer in module.layers) and module.carries_bias:
        solutions = _with_new_biases(checkpoint, before, edits)
        encoded = checkpoint.format.encode(join_layers(before, solutions), before.traits)
        yield f"{module.name}.bias", encoded["bias"].contiguous()


def _new_moved_biases(checkpoint: Checkpoint, edits: Edits) -> dict[str, Tensor]:
    """The part of changed biases that the file stores moved by an offset, as it is without."""
    found: dict[str, Tensor] = {}
    for module in checkpoint.file.modules:
        if any(f"{layer.name}.bias" in edits.vectors for layer in module.layers) and module.carries_bias:
            found |= moved_biases(module, _with_new_biases(checkpoint, module, edits))
    return found


def _with_new_biases(checkpoint: Checkpoint, module: StoredModule, edits: Edits) -> dict[str, LayerSolution]:
    solutions: dict[str, LayerSolution] = {}
    for layer in module.layers:
        solution = checkpoint.solution(layer)
        if (added := edits.vectors.get(f"{layer.name}.bias")) is not None and solution.bias is not None:
            bias = (solution.bias.float() + added).to(solution.bias.dtype)
            solution = replace(solution, bias=bias)
        solutions[layer.name] = solution
    return solutions


def _sixteen_bit(checkpoint: Checkpoint, name: str, edits: Edits) -> Tensor:
    """A 16-bit tensor of the checkpoint, or what a W4A16 layer's codes represent."""
    if layer_of(name) not in edits.dense:
        return checkpoint.kept_tensor(name)
    solution = checkpoint.solution(checkpoint.by_name[layer_of(name)])
    if name.endswith(".bias"):
        assert solution.bias is not None  # the tensor is in the model's state
        return solution.bias
    return rebuilt_weight(solution)
