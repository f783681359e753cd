"""Weights of the source on their way to the device that solves: read ahead, or each when it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.errors import InputError, as_out_of_memory
from svdq_cli.records import LayerPlan, SharedInput
from svdq_cli.solve.forward import SourceWeight
from svdq_cli.source import Source, TensorEntry, is_finite, read_tensor, tensor_entry

READ_AT_ONCE = 1 << 22  # numbers


@dataclass(frozen=True, slots=True, eq=False)
class RawWeight:
    """One linear as the source stores it."""

    weight: Tensor  # (N, K), or (N, K, 1, 1) of a 1x1 convolution
    bias: Tensor | None  # (N,)

    def on(self, device: torch.device) -> SourceWeight:
        """In float32 on `device`. From pinned memory the copy runs while the CPU goes on."""
        bias = None if self.bias is None else self.bias.to(device, non_blocking=True).float()
        return SourceWeight(self.weight.to(device, non_blocking=True).float().flatten(1), bias)

    def pinned(self) -> RawWeight:
        """In page-locked memory, from which a GPU reads by itself; from other memory the driver copies it first, while
        the CPU waits. As it is where the system has no more such memory."""
        try:
            return RawWeight(self.weight.pin_memory(), None if self.bias is None else self.bias.pin_memory())
        except RuntimeError as error:
            if as_out_of_memory(error) is None:
                raise
            return self


@dataclass(frozen=True, slots=True)
class StreamedWeights(Mapping[str, SourceWeight]):
    """Weights of a portion, each read from the source whenever it is asked for and held by nobody."""

    source: Source
    plans: Mapping[str, LayerPlan]
    names: tuple[str, ...]
    device: torch.device

    def __getitem__(self, name: str) -> SourceWeight:
        return source_weight(self.source, self.plans[name], self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_ahead(
    source: Source, plans: Mapping[str, LayerPlan], device: torch.device, portion: SharedInput
) -> dict[str, RawWeight]:
    """The weights of a portion, for a GPU pinned. None of them where memory runs out: they are read again when the
    portion's turn has come and the one before it is gone."""
    try:
        raw = {name: raw_weight(source, plans[name]) for name in portion.layers}
        return {name: each.pinned() for name, each in raw.items()} if device.type == "cuda" else raw
    except (RuntimeError, MemoryError) as error:
        if as_out_of_memory(error) is None:
            raise
        return {}


def raw_weight(source: Source, plan: LayerPlan) -> RawWeight:
    """Read from the source. InputError where it holds NaN or infinity."""
    bias = finite_tensor(source, f"{plan.name}.bias") if plan.linear.bias else None
    return RawWeight(finite_tensor(source, f"{plan.name}.weight"), bias)


def source_weight(source: Source, plan: LayerPlan, device: torch.device) -> SourceWeight:
    """One linear of the source in float32 on `device`, read some rows at a time: it is never in memory as it is stored.
    InputError where it holds NaN or infinity."""
    name, linear = f"{plan.name}.weight", plan.linear
    entry = tensor_entry(source, name)
    weight = torch.empty(linear.out_features, linear.in_features, device=device)
    step = max(1, READ_AT_ONCE // linear.in_features)
    for start in range(0, linear.out_features, step):
        rows = require_finite(entry.read_rows(start, start + step), name, entry)
        weight[start : start + step] = rows.flatten(1)
    bias = finite_tensor(source, f"{plan.name}.bias").to(device).float() if linear.bias else None
    return SourceWeight(weight, bias)


def finite_tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor of the source. InputError where it holds NaN or infinity."""
    return require_finite(read_tensor(source, name), name, source.tensors[name])


def require_finite(tensor: torch.Tensor, name: str, entry: TensorEntry) -> torch.Tensor:
    """`tensor`, read from `entry`. InputError where it holds NaN or infinity."""
    if not is_finite(tensor):
        stored = f" (stored as {entry.origin})" if entry.origin != name else ""
        raise InputError(
            f"{entry.file}: {name}{stored} holds NaN or infinite values",
            hint="the checkpoint is damaged or its training diverged; download it again or use another",
            where=name,
            kind="not-finite",
        )
    return tensor
