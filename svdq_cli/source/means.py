"""A model whose inputs have had their means moved into biases: it computes what it did, from smaller numbers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source.model import MovedMean, Source, tensor_entry
from svdq_cli.source.shifted import with_values

READ_AT_ONCE = 1 << 22  # numbers of a weight


def without_means(source: Source, moved: Sequence[MovedMean], dtype: torch.dtype) -> Source:
    """The source whose biases are those of a checkpoint in `dtype` from which `moved` was moved.

    What a producer gives away is what its numbers in `dtype` say, so that its rounding reaches no reader. The source
    itself where nothing was moved, or all of it is already. Raises InputError for names or sizes that are not the
    source's.
    """
    if not moved or source.moved is moved:
        return source
    values: dict[str, Tensor] = {}

    def bias(name: str) -> Tensor:
        if name not in values:
            values[name] = tensor_entry(source, name).read().float()
        return values[name]

    for each in moved:
        given: list[Tensor] = []
        for name, start in each.producers:
            before = bias(name).flatten()
            part = slice(start, start + len(each.mean))
            if len(before[part]) != len(each.mean):
                raise InputError(f"{name} has no {len(each.mean)} numbers from {start} on", where=name)
            after = before.clone()
            after[part] = (before[part] - each.mean).to(dtype).float()
            given.append(before[part] - after[part])
            values[name] = after.reshape(values[name].shape)
        mean = torch.stack(given).mean(0)
        for name in each.readers:
            values[f"{name}.bias"] = bias(f"{name}.bias") + _times(source, f"{name}.weight", mean)
    return replace(with_values(source, values), moved=moved)


def _times(source: Source, name: str, vector: Tensor) -> Tensor:
    """A weight times a vector of its first columns, some rows at a time."""
    entry = tensor_entry(source, name)
    step = max(1, READ_AT_ONCE // max(1, entry.shape[1]))
    if len(vector) > entry.shape[1]:
        raise InputError(f"{name} has {entry.shape[1]} columns, fewer than {len(vector)}", where=name)
    parts = (
        entry.read_rows(start, start + step).float().flatten(1)[:, : len(vector)].double() @ vector.double()
        for start in range(0, entry.shape[0], step)
    )
    return torch.cat(list(parts)).float()


def means_by_layer(moved: Sequence[MovedMean], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """What every reader's input is less than it was, (K,) float32. `widths`: K of every layer."""
    found: dict[str, Tensor] = {}
    for each in moved:
        for name in each.readers:
            if name in widths and len(each.mean) <= widths[name]:
                whole = torch.zeros(widths[name], dtype=torch.float32)
                whole[: len(each.mean)] = each.mean
                found[name] = whole
    return found


def moved_json(moved: Sequence[MovedMean]) -> list[dict[str, object]]:
    """Moved means as JSON for a checkpoint's header: vectors as base64 of little-endian bfloat16."""
    return [
        {
            "readers": list(each.readers),
            "producers": [[name, start] for name, start in each.producers],
            "mean": base64.b64encode(each.mean.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()).decode(
                "ascii"
            ),
        }
        for each in moved
    ]


def moved_of_json(said: object) -> tuple[MovedMean, ...]:
    """The inverse of `moved_json`. Raises InputError for anything else."""
    try:
        return tuple(_moved(cast("Mapping[str, object]", each)) for each in cast("list[object]", said or []))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, binascii.Error) as error:
        raise InputError(
            "header: the record of input means moved into biases can't be read",
            hint="the file is damaged",
            where="means",
        ) from error


def _moved(said: Mapping[str, object]) -> MovedMean:
    readers, producers, text = said["readers"], said["producers"], said["mean"]
    if not (isinstance(readers, list) and isinstance(producers, list) and isinstance(text, str)):
        raise TypeError
    raw = bytearray(base64.b64decode(text, validate=True))
    named = tuple((str(name), int(start)) for name, start in cast("list[tuple[str, int]]", producers))
    if any(start < 0 for _, start in named):
        raise ValueError
    return MovedMean(
        tuple(map(str, cast("list[object]", readers))),
        named,
        torch.frombuffer(raw, dtype=torch.bfloat16).float(),
    )
