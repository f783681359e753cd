"""The layers of an adapter file in a model: which tensors each changes, and whether it fits them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.adapters.changes import Measured, StoredChange, change_of, low_rank_of
from svdq_cli.adapters.configs import TrainingConfig
from svdq_cli.adapters.keys import AdapterModule, refused, require_numbers, some, twice
from svdq_cli.adapters.names import ModelShapes, Places, find_place
from svdq_cli.adapters.updates import ColumnDoraUpdate, LowRankUpdate, Ranges, WeightChange, WholeUpdate
from svdq_cli.errors import InputError
from svdq_cli.source.names import Part


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """What one layer of an adapter file does: to which weights, and to which biases and norms."""

    name: str  # in the file, without the ending
    kind: str
    rank: int | None  # None: of no low rank
    weights: Mapping[str, StoredChange]  # by the model's tensor name
    vectors: Mapping[str, Tensor]  # by the model's tensor name: (N,) float32, at full strength
    changes: bool  # whether it does anything


def fitted_layers(
    file: Path,
    modules: Sequence[AdapterModule],
    places: Places,
    model: ModelShapes,
    trained: TrainingConfig | None,
) -> tuple[AdaptedLayer, ...]:
    """Every layer in its place. Raises InputError for one without a place, and for two in the same."""
    homeless = [module for module in modules if find_place(places, module.name) is None]
    if homeless:
        raise _no_place(file, model, modules, homeless)
    layers: list[AdaptedLayer] = []
    claimed: dict[str, AdapterModule] = {}
    for module in modules:
        parts = find_place(places, module.name)
        assert parts is not None
        layer = _adapted(file, module, parts, model, trained)
        for name in (*layer.weights, *layer.vectors):
            if name in claimed:
                first, second = (next(iter(m.keys.values())).origin for m in (claimed[name], module))
                raise twice(file, first, second, f"the update of {name}")
            claimed[name] = module
        layers.append(layer)
    return tuple(layers)


def _adapted(
    file: Path,
    module: AdapterModule,
    parts: tuple[Part, ...],
    model: ModelShapes,
    trained: TrainingConfig | None,
) -> AdaptedLayer:
    """What a module does to each tensor that it changes. Raises InputError where sizes disagree or a value is NaN."""
    require_numbers(file, module)
    vectors = _vectors(file, module, parts, model, trained)
    if module.algorithm is None and not _adds_to_matrix(module, parts, model):
        changes = any(bool(added.any()) for added in vectors.values())
        return AdaptedLayer(module.name, WholeUpdate.kind, None, {}, vectors, changes)
    if module.algorithm is None and len(module.keys["difference"].shape) < 2:
        raise refused(
            file,
            f"{module.name}: a difference of shape {list(module.keys['difference'].shape)}, but the weight is a matrix",
            "the LoRA was trained on a different variant of the model",
            module.name,
            kind="lora-mismatch",
        )
    change = _sound_change(file, module, trained)
    layer = dict(_weight_rows(file, module, parts, change, model))
    _require_dora_sizes(file, module, change)
    measured = Measured()
    columns = change.added.shape[1] if isinstance(change, WholeUpdate) else low_rank_of(change).down.shape[1]
    weights = {
        name: StoredChange(module, ranges, trained, layer, columns, measured)
        for name, ranges in layer.items()
    }
    changes = _does_something(module, change) or any(bool(added.any()) for added in vectors.values())
    return AdaptedLayer(module.name, change.kind, change.rank, weights, vectors, changes)


def _does_something(module: AdapterModule, change: WeightChange) -> bool:
    match change:
        case LowRankUpdate():
            return change.scale != 0 and not module.is_zero()
        case WholeUpdate():
            return bool(change.added.any())
        case _:
            return True


def _sound_change(file: Path, module: AdapterModule, trained: TrainingConfig | None) -> WeightChange:
    try:
        return change_of(module, trained)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # torch's words for matrices that do not fit, ours for an odd alpha
        raise refused(
            file,
            f"{module.name}: the shapes of its factors do not match: {str(error).splitlines()[0]}",
            "the file is damaged; download it again",
            module.name,
        ) from error


def _adds_to_matrix(module: AdapterModule, parts: tuple[Part, ...], model: ModelShapes) -> bool:
    """Whether a difference is of a weight with inputs, and not of a norm."""
    return "difference" in module.keys and len(model.shapes[f"{parts[0].target}.weight"]) > 1


def _require_dora_sizes(file: Path, module: AdapterModule, change: WeightChange) -> None:
    """DoRA has a length for each of its rows, or of its columns; and no bias."""
    if isinstance(change, LowRankUpdate | WholeUpdate):
        return
    rows, columns = change.direction.up.shape[0], change.direction.down.shape[1]
    lengths = change.magnitude.numel()
    by_columns = isinstance(change, ColumnDoraUpdate)
    if lengths != rows if not by_columns else columns % lengths:
        shape = list(module.keys["magnitude"].shape)
        raise refused(
            file,
            f"{module.name}: DoRA with {lengths} lengths, of shape {shape}, for {rows} rows and {columns} columns",
            "the file is damaged; download it again",
            module.name,
        )
    if "bias" in module.keys:
        raise refused(
            file,
            f"{module.name}: DoRA with its own bias, which no known trainer writes",
            "merge it into the model with the tool that trained it, and convert the result",
            module.name,
        )


def _vectors(
    file: Path,
    module: AdapterModule,
    parts: tuple[Part, ...],
    model: ModelShapes,
    trained: TrainingConfig | None,
) -> dict[str, Tensor]:
    """What a module adds to biases, and to the weights of norms, by tensor."""
    found: dict[str, Tensor] = {}
    added: list[Tensor] = []
    if "bias" in module.keys:
        change = _sound_change(file, module, trained)
        assert not isinstance(change, WholeUpdate)  # a bias of factors
        added.append(module.read("bias").float() * low_rank_of(change).scale)
    if "bias_difference" in module.keys:
        added.append(module.read("bias_difference").float())
    for tensor in added:
        for name, rows in _vector_rows(file, module, parts, model, tensor.flatten(), "bias"):
            found[name] = found[name] + rows if name in found else rows
    if "difference" in module.keys and not _adds_to_matrix(module, parts, model):
        difference = module.read("difference").float().flatten()
        found |= dict(_vector_rows(file, module, parts, model, difference, "weight"))
    return found


def _vector_rows(
    file: Path,
    module: AdapterModule,
    parts: tuple[Part, ...],
    model: ModelShapes,
    added: Tensor,
    suffix: str,
) -> Iterator[tuple[str, Tensor]]:
    """What a vector of the module adds to each tensor. InputError where its size is not the model's."""
    for part in parts:
        rows = model.shapes[f"{part.target}.weight"][0]
        ranges = _ranges(part, len(added))
        if sum(stop - start for start, stop in ranges) != rows:
            what = "bias" if suffix == "bias" else "difference"
            raise refused(
                file,
                f"{module.name}: its {what} has {len(added)} values, but {part.target}.{suffix} has {rows}",
                "the LoRA was trained on a different variant of the model",
                module.name,
                kind="lora-mismatch",
            )
        yield f"{part.target}.{suffix}", torch.cat([added[start:stop] for start, stop in ranges])


def _weight_rows(
    file: Path, module: AdapterModule, parts: tuple[Part, ...], change: WeightChange, model: ModelShapes
) -> Iterator[tuple[str, Ranges]]:
    """The rows of the module that each weight consists of. InputError where the sizes are not the model's."""
    if isinstance(change, WholeUpdate):
        sizes = [list(change.added.shape)]
    else:
        update = low_rank_of(change)
        sizes = [list(update.up.shape), list(update.down.shape)]
    fit = len(sizes) == 1 or sizes[0][1] == sizes[1][0]
    for part in parts:
        name = f"{part.target}.weight"
        shape = model.shapes[name]
        ranges = _ranges(part, sizes[0][0])
        rows = sum(stop - start for start, stop in ranges)
        if not fit or rows != shape[0] or sizes[-1][1] != math.prod(shape[1:]):
            raise refused(
                file,
                f"{module.name} has matrices {' and '.join(map(str, sizes))}, but {name} has shape {list(shape)}",
                "the LoRA was trained on a different variant of the model",
                module.name,
                kind="lora-mismatch",
            )
        yield name, ranges


def _ranges(part: Part, rows: int) -> list[tuple[int, int]]:
    """The rows of a part, in a module with this many rows; none where they can't be divided that way."""
    try:
        return [rows_range.among(rows) for rows_range in part.rows]
    except ValueError:
        return []


def _no_place(
    file: Path, model: ModelShapes, modules: Sequence[AdapterModule], homeless: Sequence[AdapterModule]
) -> InputError:
    names = some([module.name for module in homeless])
    if len(homeless) == len(modules):
        return refused(
            file,
            f"made for a different model: none of its {len(modules)} layers is in {model.class_name}, "
            f"for example {names}",
            "give a LoRA that was trained on this model's family",
            homeless[0].name,
            kind="lora-mismatch",
        )
    return refused(
        file,
        f"{len(homeless)} of its {len(modules)} layers are not in {model.class_name}: {names}",
        "the LoRA was trained on a variant of the model; svdq never applies only a part of a LoRA",
        homeless[0].name,
        kind="lora-mismatch",
    )
