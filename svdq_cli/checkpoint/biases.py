"""Biases that a runtime wants moved: exact with the header's record of them, to one rounding without.

A runtime that shifts the activation, or multiplies by x where the model multiplies by 1 + x, wants the difference in
the bias, and the sum is rounded to 16 bits. The file's header therefore carries those biases as they were
(`moved_biases`).

What the shift adds is undone with the weights that are really stored:
(x + c) / s . Q^T + branch(x) + b'  with  b' = b - c . sum_k Q[n, k] / s[k],  so that the module is the same function as
the unshifted one. (Folding the float weight instead, b - c . sum_k (W - U D)[n, k], leaves c times the sum of a row's
rounding errors in the output.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from svdq_cli.checkpoint.file_layout import StoredModule
from svdq_cli.checkpoint.lossless import same_bits
from svdq_cli.errors import InputError
from svdq_cli.families.layouts.layout import Interleaved
from svdq_cli.records import GELU_SHIFT, LayerPlan, LayerSolution, W4A4Solution, W4A16Solution

_Solution = TypeVar("_Solution", W4A4Solution, W4A16Solution)


def moved_biases(module: StoredModule, solutions: Mapping[str, LayerSolution]) -> dict[str, Tensor]:
    """The part of each layer's bias that the module holds moved by an offset, as it was, by layer."""
    rows = _moved_rows(module)
    if rows is None:
        return {}
    (layer,) = module.layers
    bias = solutions[layer.name].bias
    return {} if bias is None else {layer.name: bias[rows].clone()}


def moved_sizes(module: StoredModule) -> dict[str, int]:
    """How many numbers `moved_biases` has of each layer."""
    rows = _moved_rows(module)
    return {} if rows is None else {layer.name: len(rows) for layer in moved_layers(module)}


def moved_layers(module: StoredModule) -> tuple[LayerPlan, ...]:
    """The layers whose bias the module holds moved by an offset."""
    if _moved_rows(module) is None:
        return ()
    return tuple(layer for layer in module.layers if layer.linear.bias)


def shift_offset(module: StoredModule, joined: W4A4Solution) -> Tensor | None:
    """-c . sum_k Q[n, k] / s[k], (N,) float64 in stacked order; None where the activation is not shifted."""
    if not module.traits.unsigned:
        return None
    groups = joined.scales.shape[1]
    inverse = (1 / joined.smooth.double()).reshape(groups, -1)
    by_group = [
        joined.codes[:, g * len(inverse[g]) : (g + 1) * len(inverse[g])].double() @ inverse[g]
        for g in range(groups)
    ]
    return -GELU_SHIFT * (torch.stack(by_group, dim=1) * joined.scales.double()).sum(1)


def one_offset(module: StoredModule) -> Tensor | None:
    """One in the rows of the blocks that the model uses as 1 + x, (N,) float64 in stacked order."""
    rows = _moved_rows(module)
    if rows is None:
        return None
    offset = torch.zeros(module.plan.linear.out_features, dtype=torch.float64)
    offset[rows] = 1
    return offset


def _moved_rows(module: StoredModule) -> Tensor | None:
    """The rows, in stacked order, whose bias is moved; None for none."""
    rows = torch.arange(module.plan.linear.out_features)
    if module.traits.unsigned:
        return rows if module.carries_bias else None
    if module.one_plus and isinstance(module.order, Interleaved):
        return rows.reshape(module.order.parts, -1)[list(module.one_plus)].flatten()
    return None


def stored_bias(module: StoredModule, parts: list[_Solution], offset: Tensor | None) -> Tensor | None:
    """The biases under one another, moved by the offset: added in float64, rounded once. (sum of N,)."""
    if not module.plan.linear.bias:
        return None
    dtype = parts[0].scales.dtype if isinstance(parts[0], W4A16Solution) else parts[0].smooth.dtype
    biases = [
        part.bias
        if module.carries_bias and part.bias is not None
        else torch.zeros(len(part.codes), dtype=dtype)
        for part in parts
    ]
    joined = torch.cat(biases)
    return joined if offset is None else (joined.double() + offset).to(dtype)


def source_bias(
    layer: LayerPlan,
    module: StoredModule,
    stored: LayerSolution,
    rows: slice,
    offset: Tensor | None,
    moved: Tensor | None,
) -> Tensor | None:
    """The layer's own bias out of the stored one. InputError where the file contradicts itself. (N,)."""
    wanted = layer.linear.bias and module.carries_bias
    bias = stored.bias
    if bias is None:
        if wanted:
            raise InputError(f"{module.name}: the bias of {layer.name} is missing", where=module.name)
        return None
    found = bias[rows]
    if not wanted:
        _require_only_offset(module, found, None if offset is None else offset[rows])
        return None
    if offset is None:
        return found.clone()
    moved_rows = _moved_rows(module)
    plain = (found.double() - offset[rows]).to(found.dtype)
    if moved is None or moved_rows is None:
        return plain
    if moved.shape != moved_rows.shape or moved.dtype != found.dtype:
        raise InputError(
            f"{layer.name}: the bias recorded in the header has a different size", where=layer.name
        )
    plain[moved_rows] = moved
    if not same_bits((plain.double() + offset[rows]).to(found.dtype), found):
        raise InputError(
            f"{module.name}: bias does not match the one in the header, shifted for the runtime",
            where=module.name,
            hint="the biases of two modules may have been swapped, or the file was changed",
        )
    return plain


def _require_only_offset(module: StoredModule, bias: Tensor, offset: Tensor | None) -> None:
    """A bias that no layer has is zero, or what the runtime's shift makes of zero."""
    expected = torch.zeros_like(bias) if offset is None else offset.to(bias.dtype)
    if not bool((bias == expected).all()):
        raise InputError(
            f"{module.name}: bias is not zero, although the model's layer has no bias", where=module.name
        )
