"""Checkpoints under their original names, made from diffusers models by reading svdq's rules backwards.

The rules themselves are held against diffusers' own converters in test_original_names.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.source.names import Naming, Part, original_layers

KEYS = Path(__file__).parent / "keys"


@dataclass(frozen=True, slots=True)
class MemoryTensor:
    """A tensor entry without a file."""

    tensor: Tensor
    origin: str = ""
    file: Path = Path("memory")
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        return self.tensor

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


def real_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint. A line is `key AxB`; `{0-18}` in it stands for all those numbers."""
    keys: dict[str, tuple[int, ...]] = {}
    for line in (KEYS / f"{name}.txt").read_text().splitlines():
        key, shape = line.split()
        sizes = tuple(int(size) for size in shape.split("x"))
        if found := re.search(r"\{(\d+)-(\d+)\}", key):
            for number in range(int(found[1]), int(found[2]) + 1):
                keys[key[: found.start()] + str(number) + key[found.end() :]] = sizes
        else:
            keys[key] = sizes
    return keys


def has_norm_scale(layer: str) -> bool:
    """Whether a weight of this original layer is called as its naming's `suffixes` say."""
    return "norm" in layer or layer == "txtmlp.0"


def original_state(
    naming: Naming, state: Mapping[str, Tensor], has_scale: Callable[[str], bool] = has_norm_scale
) -> dict[str, Tensor]:
    """A diffusers state dict under its original names, fused as the original is."""
    # rules name layers or bare tensors
    layers = list(dict.fromkeys([*(_layer(name) for name in state), *state]))
    suffix_of = {new: old for old, new in naming.suffixes.items()}
    original: dict[str, Tensor] = {}
    # a rule for all layers below a name speaks again of those with rules of their own
    written: set[str] = set()
    for layer, parts in original_layers(naming, layers).items():
        for suffix in ("weight", "bias", ""):
            names = [".".join(filter(None, (part.target, suffix))) for part in parts]
            if all(name in state and name not in written for name in names):
                written.update(names)
                old = suffix_of.get(suffix, suffix) if has_scale(layer) else suffix
                original[".".join(filter(None, (layer, old)))] = _assembled(parts, [state[n] for n in names])
    return original


def row_numbers(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Stand-ins for tensors: every row of every tensor has its own number, so that no two rows can be mistaken."""
    first = 0
    numbered: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        numbered[name] = torch.arange(first, first + rows, dtype=torch.float64)
        first += rows
    return numbered


def _layer(name: str) -> str:
    layer, _, suffix = name.rpartition(".")
    return layer if suffix in ("weight", "bias") else name


def _assembled(parts: Sequence[Part], tensors: Sequence[Tensor]) -> Tensor:
    rows = sum(tensor.shape[0] for tensor in tensors)
    whole = torch.empty(rows, *tensors[0].shape[1:], dtype=tensors[0].dtype)
    for part, tensor in zip(parts, tensors, strict=True):
        begin = 0
        for start, stop in (rows_range.among(rows) for rows_range in part.rows):
            whole[start:stop] = tensor[begin : begin + stop - start]
            begin += stop - start
    return whole
