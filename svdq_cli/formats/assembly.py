"""Numbers between the layers of a model and the modules of a file, exact in both directions.

`join_layers` stacks the solutions of the layers that a module holds; `take_layer` gives one of them back, bit for bit.
Only biases can lose bits on the way: a runtime that shifts the activation, or multiplies by x where the model
multiplies by 1 + x, wants the difference in the bias, and the sum is rounded to 16 bits. The file's header therefore
carries those biases as they were (`moved_biases`). Without them (a file of another tool) the difference is taken out
again, which is exact to one rounding.

What the shift adds is undone with the weights that are really stored:
(x + c) / s . Q^T + branch(x) + b'  with  b' = b - c . sum_k Q[n, k] / s[k],  so that the module is the same function as
the unshifted one. (Folding the float weight instead, b - c . sum_k (W - U D)[n, k], leaves c times the sum of a row's
rounding errors in the output.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts.layout import Interleaved
from svdq_cli.formats.branches import (
    columns_joined,
    cut_branch,
    inverse,
    not_together,
    rows_of,
    stacked_branches,
    stored_rows,
    width_of,
)
from svdq_cli.formats.contract import Branch
from svdq_cli.formats.modules import TILE, KeptTensor, StoredModule, row_sources
from svdq_cli.formats.moves import join, same_bits, take_rows
from svdq_cli.pack.padding import pad
from svdq_cli.records import (
    GELU_SHIFT,
    LayerPlan,
    LayerSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)

_Solution = TypeVar("_Solution", W4A4Solution, W4A16Solution)


# ---------------------------------------------------------------------------------------------------- to the file


def join_layers(module: StoredModule, solutions: Mapping[str, LayerSolution]) -> LayerSolution:
    """What the module holds. UsageError where its layers were not solved as this format needs them."""
    plan = module.plan
    match plan:
        case W4A4Plan():
            parts = [_w4a4(solutions[layer.name]) for layer in module.layers]
            if module.pads:
                parts = [_padded(part) for part in parts]
            joined = _stack(module, plan, parts)
            stored = replace(joined, bias=_stored_bias(module, parts, _shift_offset(module, joined)))
        case W4A16Plan():
            parts = [_w4a16(solutions[layer.name]) for layer in module.layers]
            (only,) = parts
            stored = W4A16Solution(
                plan, only.codes, only.scales, only.zeros, _stored_bias(module, parts, _one_offset(module))
            )
    return _reordered(stored, stored_rows(module))


def moved_biases(module: StoredModule, solutions: Mapping[str, LayerSolution]) -> dict[str, Tensor]:
    """The part of each layer's bias that the module holds moved by an offset, as it was, by layer."""
    rows = _moved_rows(module)
    if rows is None:
        return {}
    (layer,) = module.layers
    bias = solutions[layer.name].bias
    return {} if bias is None else {layer.name: bias[rows].clone()}


def moved_layers(module: StoredModule) -> tuple[LayerPlan, ...]:
    """The layers whose bias the module holds moved by an offset."""
    if _moved_rows(module) is None:
        return ()
    return tuple(layer for layer in module.layers if layer.linear.bias)


def kept_tensor(tensor: KeptTensor, parts: list[Tensor]) -> Tensor:
    """The stored tensor of the model's."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    sources = row_sources(tensor.order, len(joined))
    ordered = joined if sources is None else joined[torch.tensor(sources)]
    return ordered.movedim(1, -1) if tensor.channels_last else ordered


def source_tensor(tensor: KeptTensor, stored: Tensor, shapes: list[tuple[int, ...]], index: int) -> Tensor:
    """The model's tensor at `index` of a stored one; `shapes` are those of all. The inverse of `kept_tensor`."""
    if tensor.channels_last:
        stored = stored.movedim(-1, 1)
    sources = row_sources(tensor.order, len(stored))
    if sources is not None:
        stored = stored[inverse(torch.tensor(sources))]
    start = sum(shape[0] for shape in shapes[:index])
    return stored[start : start + shapes[index][0]] if len(shapes) > 1 else stored


# ---------------------------------------------------------------------------------------------------- from the file


def take_layer(
    layer: LayerPlan,
    parts: list[tuple[StoredModule, LayerSolution]],
    moved: Tensor | None,
) -> LayerSolution:
    """A layer's solution from the modules that hold it, in the order of its columns.

    `moved`: what the header says of its bias. InputError where the stored numbers are none of this layer's.
    """
    found = [_part(layer, module, stored, moved) for module, stored in parts]
    match layer:
        case W4A4Plan():
            return _columns_joined(layer, [_w4a4(part) for part in found])
        case W4A16Plan():
            return found[0]


def _part(
    layer: LayerPlan, module: StoredModule, stored: LayerSolution, moved: Tensor | None
) -> LayerSolution:
    indices = stored_rows(module)
    stored = _reordered(stored, None if indices is None else inverse(indices))
    rows = rows_of(layer, module)
    match stored:
        case W4A4Solution():
            bias = _source_bias(layer, module, stored, rows, _shift_offset(module, stored), moved)
            return _cut(layer, module, stored, rows, bias)
        case W4A16Solution():
            if not isinstance(layer, W4A16Plan):
                raise InputError(f"{layer.name}: stored as W4A16, planned as W4A4", where=layer.name)
            bias = _source_bias(layer, module, stored, rows, _one_offset(module), moved)
            return W4A16Solution(layer, stored.codes, stored.scales, stored.zeros, bias)


def _columns_joined(layer: W4A4Plan, parts: list[W4A4Solution]) -> W4A4Solution:
    """One layer from the parts of its columns. Parts share `up`, or have branches of their own."""
    if len(parts) == 1:
        return parts[0]
    branch = columns_joined(layer, [Branch(part.down, part.up) for part in parts])
    outers = [part.outer for part in parts]
    if not all(same_bits(outer, outers[0]) for outer in outers[1:]):
        raise InputError(f"{layer.name}: its two stored parts have different outer scales", where=layer.name)
    return W4A4Solution(
        plan=layer,
        smooth=torch.cat([part.smooth for part in parts]),
        down=branch.down,
        up=branch.up,
        codes=torch.cat([part.codes for part in parts], dim=1),
        scales=join([part.scales for part in parts], dim=1),
        outer=outers[0],
        bias=parts[-1].bias,
    )


# ---------------------------------------------------------------------------------------------------- stacking


def _stack(module: StoredModule, plan: W4A4Plan, parts: list[W4A4Solution]) -> W4A4Solution:
    """The rows of all layers under one another, without the bias."""
    first = parts[0]
    for part in parts[1:]:
        if not same_bits(part.smooth, first.smooth):
            raise not_together(module, first.plan.name, part.plan.name, "smoothing factors")
    columns = slice(None) if module.columns is None else slice(*module.columns)
    groups = (
        slice(None)
        if module.columns is None
        else slice(*(edge // plan.precision.group for edge in module.columns))
    )
    branch = stacked_branches(module, {part.plan.name: part for part in parts})
    return W4A4Solution(
        plan=plan,
        smooth=first.smooth[columns],
        down=branch.down[:, columns],
        up=branch.up,
        codes=torch.cat([part.codes for part in parts])[:, columns],
        scales=join([part.scales for part in parts])[:, groups],
        outer=_stacked_outer(module, parts),
        bias=None,
    )


def _stacked_outer(module: StoredModule, parts: list[W4A4Solution]) -> Tensor | None:
    outers = [part.outer for part in parts]
    if outers[0] is None:
        return None
    if module.traits.row_scales:
        pairs = zip(parts, outers, strict=True)
        return torch.cat([outer.expand(len(part.codes)) for part, outer in pairs if outer is not None])
    if outers[0].numel() > 1:
        raise UsageError(
            f"{module.name}: this format stores one outer scale for the module, and {parts[0].plan.name} has one "
            "per row",
            where=parts[0].plan.name,
        )
    return outers[0]


def _cut(
    layer: LayerPlan, module: StoredModule, stored: W4A4Solution, rows: slice, bias: Tensor | None
) -> W4A4Solution:
    """One layer's rows of a module in stacked order, and its share of the ranks."""
    if not isinstance(layer, W4A4Plan):
        raise InputError(f"{layer.name}: stored as W4A4, planned as W4A16", where=layer.name)
    width = width_of(layer, module)
    outer = stored.outer
    if outer is not None and outer.numel() > 1:
        outer = outer[rows]
        outer = outer[:1].clone() if bool((outer == outer[0]).all()) else outer
    branch = cut_branch(layer, module, stored)
    return W4A4Solution(
        plan=layer,
        smooth=stored.smooth[:width],
        down=branch.down,
        up=branch.up,
        codes=stored.codes[rows, :width].contiguous(),
        scales=stored.scales[rows, : width // layer.precision.group].contiguous(),
        outer=outer,
        bias=bias,
    )


def _padded(solution: W4A4Solution) -> W4A4Solution:
    """Grown to whole tiles: zeros, but ones where the runtime divides by it or multiplies with it."""
    precision = solution.plan.precision
    outer, bias = solution.outer, solution.bias
    return W4A4Solution(
        plan=solution.plan,
        smooth=pad(solution.smooth, multiples=(TILE,), fill=1),
        down=pad(solution.down, multiples=(1, TILE), fill=0),
        up=pad(solution.up, multiples=(TILE, 1), fill=0),
        codes=pad(solution.codes, multiples=(TILE, TILE), fill=0),
        scales=pad(solution.scales, multiples=(TILE, TILE // precision.group), fill=1),
        outer=outer if outer is None or outer.numel() == 1 else pad(outer, multiples=(TILE,), fill=1),
        bias=None if bias is None else pad(bias, multiples=(TILE,), fill=0),
    )


# ---------------------------------------------------------------------------------------------------- biases


def _shift_offset(module: StoredModule, joined: W4A4Solution) -> Tensor | None:
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


def _one_offset(module: StoredModule) -> Tensor | None:
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


def _stored_bias(module: StoredModule, parts: list[_Solution], offset: Tensor | None) -> Tensor | None:
    """The biases under one another, moved by the offset: added in float64, rounded once."""
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


def _source_bias(
    layer: LayerPlan,
    module: StoredModule,
    stored: LayerSolution,
    rows: slice,
    offset: Tensor | None,
    moved: Tensor | None,
) -> Tensor | None:
    """The layer's own bias out of the stored one. InputError where the file contradicts itself."""
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
        raise InputError(f"{layer.name}: the header's record of its bias has another size", where=layer.name)
    plain[moved_rows] = moved
    if not same_bits((plain.double() + offset[rows]).to(found.dtype), found):
        raise InputError(
            f"{module.name}: bias is not the one that the header records, moved by the runtime's shift",
            where=module.name,
            hint="the biases of two modules may have been swapped, or the file was changed",
        )
    return plain


def _require_only_offset(module: StoredModule, bias: Tensor, offset: Tensor | None) -> None:
    """A bias that no layer has is zero, or what the runtime's shift makes of zero."""
    expected = torch.zeros_like(bias) if offset is None else offset.to(bias.dtype)
    if not bool((bias == expected).all()):
        raise InputError(
            f"{module.name}: bias is not zero, though the model's layer has none here", where=module.name
        )


# ---------------------------------------------------------------------------------------------------- tensors


def _reordered(solution: LayerSolution, indices: Tensor | None) -> LayerSolution:
    """The rows in another order."""
    if indices is None:
        return solution

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else take_rows(tensor, indices)

    match solution:
        case W4A4Solution(outer=outer):
            return replace(
                solution,
                up=take_rows(solution.up, indices),
                codes=take_rows(solution.codes, indices),
                scales=take_rows(solution.scales, indices),
                outer=outer if outer is None or outer.numel() == 1 else take_rows(outer, indices),
                bias=moved(solution.bias),
            )
        case W4A16Solution():
            return replace(
                solution,
                codes=take_rows(solution.codes, indices),
                scales=take_rows(solution.scales, indices),
                zeros=take_rows(solution.zeros, indices),
                bias=moved(solution.bias),
            )


def _w4a4(solution: LayerSolution) -> W4A4Solution:
    if not isinstance(solution, W4A4Solution):
        raise ValueError(f"{solution.plan.name} is no W4A4 layer")
    return solution


def _w4a16(solution: LayerSolution) -> W4A16Solution:
    if not isinstance(solution, W4A16Solution):
        raise ValueError(f"{solution.plan.name} is no W4A16 layer")
    return solution
