"""Weights of the source on their way to the device that solves: read ahead, or each when it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.errors import InputError, as_out_of_memory
from svdq_cli.records import LayerPlan, SharedInput
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.source import Source, TensorEntry, is_finite, read_tensor, tensor_entry
from svdq_cli.storage.tensor_file import DTYPE_OF_NAME

READ_AT_ONCE = 1 << 20  # numbers
_ON_THE_WAY = 20  # bytes of each of them: as stored, in float32, and what merging a LoRA adds


@dataclass(frozen=True, slots=True, eq=False)
class RawWeight:
    """One linear as the source stores it."""

    weight: Tensor  # (N, K), or (N, K, 1, 1) of a 1x1 convolution
    bias: Tensor | None  # (N,)

    def on(self, device: torch.device) -> LinearWeights:
        """The weight in float32 on `device`. From pinned memory the copy runs while the CPU continues."""
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True).float()
        return LinearWeights(self.weight.to(device, non_blocking=True).float().flatten(1), bias)

    def pinned(self) -> RawWeight:
        """The weight in page-locked memory, from which a GPU reads by itself; from other memory the driver copies it
        first, while the CPU waits. As it is where the system has no more such memory."""
        try:
            return RawWeight(self.weight.pin_memory(), None if self.bias is None else self.bias.pin_memory())
        except RuntimeError as error:
            if as_out_of_memory(error) is None:
                raise
            return self


@dataclass(frozen=True, slots=True)
class StreamedWeights(Mapping[str, LinearWeights]):
    """Weights of a layer group, each read from the source at every access and never kept."""

    source: Source
    plans: Mapping[str, LayerPlan]
    names: tuple[str, ...]
    device: torch.device

    def __getitem__(self, name: str) -> LinearWeights:
        return source_weight(self.source, self.plans[name], self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_ahead(
    source: Source, plans: Mapping[str, LayerPlan], device: torch.device, layer_group: SharedInput
) -> dict[str, RawWeight]:
    """The weights of a layer group, for a GPU pinned. None of them where memory runs out: they are read again when the
    layer group's turn has come and the one before it is gone."""
    try:
        raw = {name: raw_weight(source, plans[name]) for name in layer_group.layers}
        return {name: each.pinned() for name, each in raw.items()} if device.type == "cuda" else raw
    except (RuntimeError, MemoryError) as error:
        if as_out_of_memory(error) is None:
            raise
        return {}


def raw_weight(source: Source, plan: LayerPlan) -> RawWeight:
    """Read from the source. InputError where it holds NaN or infinity."""
    name = f"{plan.name}.weight"
    entry = tensor_entry(source, name)
    # A dtype that torch does not know is refused by the first rows that are read.
    weight = torch.empty(entry.shape, dtype=DTYPE_OF_NAME.get(entry.dtype, torch.float32))
    bias = finite_tensor(source, f"{plan.name}.bias") if plan.linear.bias else None
    return RawWeight(_filled(weight, name, entry), bias)


def source_weight(source: Source, plan: LayerPlan, device: torch.device) -> LinearWeights:
    """One linear of the source in float32 on `device`; it is never in memory as it is stored. InputError where it holds
    NaN or infinity."""
    name = f"{plan.name}.weight"
    entry = tensor_entry(source, name)
    weight = _filled(torch.empty(entry.shape, device=device, dtype=torch.float32), name, entry)
    bias = finite_tensor(source, f"{plan.name}.bias").to(device).float() if plan.linear.bias else None
    return LinearWeights(weight.flatten(1), bias)


def reading_bytes(numbers: int) -> int:
    """Bytes that reading a weight of this many numbers takes in addition to the weight itself."""
    return _ON_THE_WAY * min(numbers, READ_AT_ONCE)


def _filled(weight: Tensor, name: str, entry: TensorEntry) -> Tensor:
    """`weight` with what `entry` has, read some rows at a time. Always the same rows: what a LoRA adds to them is a
    product, whose lowest bits depend on how many they are."""
    step = max(1, READ_AT_ONCE // math.prod(entry.shape[1:]))
    for start in range(0, entry.shape[0], step):
        # no name for the rows, which would keep them while the next ones are read
        weight[start : start + step] = require_finite(entry.read_rows(start, start + step), name, entry)
    return weight


def finite_tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor of the source. InputError where it holds NaN or infinity. Of any shape, the model's own."""
    return require_finite(read_tensor(source, name), name, source.tensors[name])


def require_in_range(source: Source, dtype: torch.dtype) -> None:
    """InputError for a tensor of the source with a number that `dtype` does not hold, before any work is done.

    Every tensor is read once, unless its own dtype holds no larger number.
    """
    largest = torch.finfo(dtype).max
    for name, entry in source.tensors.items():
        stored = DTYPE_OF_NAME.get(entry.dtype)
        if stored is None or not stored.is_floating_point or torch.finfo(stored).max <= largest:
            continue
        # `tensor_entry`, and not `entry`: with what LoRAs add
        found = _largest(tensor_entry(source, name))
        if largest < found < math.inf:  # NaN and infinity are called so when they are read
            raise InputError(
                f"{entry.file}: {name} holds {found:g}, but the largest number of {str(dtype)[6:]} is {largest:g}",
                hint="convert with dtype: bfloat16 (model.dtype in the recipe)",
                where=name,
                kind="out-of-range",
            )


def _largest(entry: TensorEntry) -> float:
    """The largest absolute number of a tensor, read some rows at a time."""
    if not entry.shape or not math.prod(entry.shape):
        return entry.read().abs().max().item() if not entry.shape else 0.0
    step = max(1, READ_AT_ONCE // math.prod(entry.shape[1:]))
    rows = (entry.read_rows(start, start + step) for start in range(0, entry.shape[0], step))
    return max(max(-each.min().item(), each.max().item()) for each in rows)


def require_finite(tensor: torch.Tensor, name: str, entry: TensorEntry) -> torch.Tensor:
    """`tensor`, read from `entry`. InputError where it holds NaN or infinity. Of any shape."""
    if not is_finite(tensor):
        stored = f" (stored as {entry.origin})" if entry.origin != name else ""
        raise InputError(
            f"{entry.file}: {name}{stored} holds NaN or infinite values",
            hint="the checkpoint is damaged or its training diverged; download it again or use another",
            where=name,
            kind="not-finite",
        )
    return tensor
