"""What the factors of one layer of an adapter file come to: read from the file, scaled, and measured against the
model's weight where they depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.adapters.configs import ChangedBase, TrainingConfig
from svdq_cli.adapters.keys import AdapterModule
from svdq_cli.adapters.updates import (
    ColumnDoraUpdate,
    DoraUpdate,
    LowRankUpdate,
    Ranges,
    WeightChange,
    WholeUpdate,
    as_factors,
    hadamard_update,
    kronecker_update,
    orthonormal_part,
    principal_part,
    through_core,
    without_first_ranks,
)
from svdq_cli.source.tensors import StoredTensor

WeightRows = Callable[[str, int, int], Tensor]
"""Reads rows `start` to `stop` of one of the model's weights, by tensor name and as it is without adapters: (n, K)."""

_ROWS_AT_ONCE = 1 << 20  # numbers of a weight that are measured at a time


@dataclass(slots=True, eq=False)
class Measured:
    """What a change depends on of the whole weight, kept once it was computed."""

    lengths: Tensor | None = None  # of columns
    taken: LowRankUpdate | None = None  # out of the base, when the training began


@dataclass(frozen=True, slots=True, eq=False)
class StoredChange:
    """What an adapter file adds to one weight. Read when it is asked for: LoHa's and LoKr's factors are large."""

    module: AdapterModule
    rows: Ranges  # of the adapter's layer
    trained: TrainingConfig | None
    # every weight of the adapter's layer, and the layer's rows that it consists of
    layer: Mapping[str, Ranges]
    columns: int
    measured: Measured

    def read(self, weights: WeightRows) -> WeightChange:
        """`weights` is asked where the change depends on more than the rows that are changed."""
        change = change_of(self.module, self.trained)
        if isinstance(change, WholeUpdate):
            return change.of_rows(self.rows)
        if self.trained is not None and self.trained.changed_base is not None:
            change = self._of_base(change, self.trained.changed_base, weights)
        if isinstance(change, ColumnDoraUpdate):
            if self.measured.lengths is None:
                self.measured.lengths = change.measured(self._blocks(weights)).lengths
            change = replace(change, lengths=self.measured.lengths)
        return change.of_rows(self.rows)

    def _of_base(
        self, change: LowRankUpdate | DoraUpdate | ColumnDoraUpdate, how: ChangedBase, weights: WeightRows
    ) -> LowRankUpdate | DoraUpdate | ColumnDoraUpdate:
        """The change as one of the model as it is, where its training took something out of the model first."""
        update = low_rank_of(change)
        if self.measured.taken is None:
            whole = torch.empty(update.up.shape[0], update.down.shape[1], dtype=torch.float32)
            for ranges, rows in self._blocks(weights):
                for (start, stop), part in zip(ranges, rows.split([b - a for a, b in ranges]), strict=True):
                    whole[start:stop] = part
            if how == "PiSSA":
                self.measured.taken = principal_part(whole, update.rank)
            else:
                self.measured.taken = replace(orthonormal_part(whole, update.rank), scale=update.scale)
        direction = without_first_ranks(update, self.measured.taken)
        return direction if isinstance(change, LowRankUpdate) else replace(change, direction=direction)

    def _blocks(self, weights: WeightRows) -> Iterator[tuple[Ranges, Tensor]]:
        """The rows of the adapter's whole layer, some at a time: which they are, and their numbers."""
        for name, ranges in self.layer.items():
            read = 0  # rows of this weight
            for start, stop in ranges:
                step = max(1, _ROWS_AT_ONCE // self.columns)
                for first in range(start, stop, step):
                    last = min(first + step, stop)
                    yield [(first, last)], weights(name, read, read + last - first).float().flatten(1)
                    read += last - first


def change_of(module: AdapterModule, trained: TrainingConfig | None) -> WeightChange:
    match module.algorithm:
        case "LoRA":
            update = _lora(module, trained)
        case "LoHa":
            update = _loha(module, trained)
        case "LoKr":
            update = _lokr(module, trained)
        case _:
            return WholeUpdate(module.matrix("difference"))
    if "magnitude" not in module.keys:
        return update
    magnitude = module.read("magnitude")
    by_columns = _is_by_columns(module.keys["magnitude"], rows=update.up.shape[0])
    return (ColumnDoraUpdate if by_columns else DoraUpdate)(update, magnitude.flatten())


def _is_by_columns(magnitude: StoredTensor, *, rows: int) -> bool:
    """Whether DoRA's lengths are of columns. Their shape says it: (N, 1) and (N,) are of rows, (1, C) of columns, and C
    is 1 in a depthwise convolution. Only peft stores the lengths of a convolution's rows as (1, N, 1, 1), under a name
    of its own."""
    shape = magnitude.shape
    if len(shape) < 2 or shape[0] != 1 or (shape[1] == 1 and rows == 1):
        return False
    named_by_peft = "lora_magnitude_vector" in magnitude.origin
    return not (named_by_peft and len(shape) > 2 and shape[1] == rows)


def low_rank_of(change: LowRankUpdate | DoraUpdate | ColumnDoraUpdate) -> LowRankUpdate:
    return change if isinstance(change, LowRankUpdate) else change.direction


def _lora(module: AdapterModule, trained: TrainingConfig | None) -> LowRankUpdate:
    down, up = module.matrix("down"), module.matrix("up")
    if "mid" in module.keys:
        down = through_core(module.read("mid"), down)
    return LowRankUpdate(down, up, _scale(module, down.shape[0], trained))


def _loha(module: AdapterModule, trained: TrainingConfig | None) -> LowRankUpdate:
    rank = module.keys["hada_w1_b"].shape[0]
    first, second = (_factors(module, f"hada_w{part}", core=f"hada_t{part}") for part in (1, 2))
    return hadamard_update(first, second, scale=_scale(module, rank, trained))


def _lokr(module: AdapterModule, trained: TrainingConfig | None) -> LowRankUpdate:
    factors = [
        _factors(module, f"lokr_w{part}", core=f"lokr_t{part}")
        if f"lokr_w{part}" not in module.keys
        else as_factors(module.matrix(f"lokr_w{part}"))
        for part in (1, 2)
    ]
    return kronecker_update(factors[0], factors[1], scale=_scale(module, lokr_rank(module), trained))


def _factors(module: AdapterModule, name: str, *, core: str) -> tuple[Tensor, Tensor]:
    """The pair (a (N, R), b (R, K)) of a factored matrix; with a Tucker core, LyCORIS stores a as (R, N)."""
    first, second = module.matrix(f"{name}_a"), module.matrix(f"{name}_b")
    if core not in module.keys:
        return first, second
    return first.T.contiguous(), through_core(module.read(core), second)


def lokr_rank(module: AdapterModule) -> int | None:
    """The rank of LoKr's factors; None where both matrices are whole."""
    keys = ("lokr_w1_b", "lokr_w2_b")
    return next((module.keys[key].shape[0] for key in keys if key in module.keys), None)


def _scale(module: AdapterModule, rank: int | None, trained: TrainingConfig | None) -> float:
    """alpha / rank. An adapter that says no alpha is scaled by 1, as its trainers do; a LoKr of whole matrices with an
    alpha too, for it is LyCORIS', which ignores it there. peft does not."""
    assert module.algorithm is not None
    if "alpha" in module.keys:
        alpha = module.read("alpha").float().reshape(()).item()
        return 1.0 if rank is None else alpha / rank
    return 1.0 if trained is None else trained.scale(module.name, module.algorithm, rank)
