"""Numbers between the layers of a model and the modules of a file, exact in both directions.

`join_layers` stacks the solutions of the layers that a module holds; `take_layer` gives one of them back, bit for bit.
Only biases can lose bits on the way: see `checkpoint.biases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.checkpoint.biases import one_offset, shift_offset, source_bias, stored_bias
from svdq_cli.checkpoint.branches import (
    columns_joined,
    cut_branch,
    inverse,
    not_together,
    rows_of,
    stacked_branches,
    stored_rows,
    width_of,
)
from svdq_cli.checkpoint.file_layout import TILE, KeptTensor, StoredModule
from svdq_cli.checkpoint.lossless import join, same_bits, take_rows
from svdq_cli.checkpoint.row_orders import row_sources
from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats.contract import Branch
from svdq_cli.pack.padding import pad
from svdq_cli.records import (
    LayerPlan,
    LayerSolution,
    RotatedPlan,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)

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
            stored = replace(joined, bias=stored_bias(module, parts, shift_offset(module, joined)))
        case W4A16Plan():
            parts = [_w4a16(solutions[layer.name]) for layer in module.layers]
            (only,) = parts
            stored = W4A16Solution(
                plan, only.codes, only.scales, only.zeros, stored_bias(module, parts, one_offset(module))
            )
        case RotatedPlan():
            stored = _rotated_stack(plan, [_rotated(solutions[layer.name]) for layer in module.layers])
    return _reordered(stored, stored_rows(module))


def kept_tensor(tensor: KeptTensor, parts: list[Tensor]) -> Tensor:
    """The stored tensor of the model's. Of the shape in the file, any shape."""
    if tensor.experts:
        return torch.stack([part.T for part in parts])
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    sources = row_sources(tensor.order, len(joined))
    ordered = joined if sources is None else joined[torch.tensor(sources, dtype=torch.int64)]
    return ordered.movedim(1, -1) if tensor.channels_last else ordered


def source_tensor(tensor: KeptTensor, stored: Tensor, shapes: list[tuple[int, ...]], index: int) -> Tensor:
    """The model's tensor at `index` of a stored one; `shapes` are those of all. The inverse of `kept_tensor`, but
    for experts, which are read one at a time (`source.SliceTensor`). Any shape."""
    if tensor.channels_last:
        stored = stored.movedim(-1, 1)
    sources = row_sources(tensor.order, len(stored))
    if sources is not None:
        stored = stored[inverse(torch.tensor(sources, dtype=torch.int64))]
    start = sum(shape[0] for shape in shapes[:index])
    return stored[start : start + shapes[index][0]] if len(shapes) > 1 else stored


# ---------------------------------------------------------------------------------------------------- from the file


def take_layer(
    layer: LayerPlan,
    parts: list[tuple[StoredModule, LayerSolution]],
    moved: Tensor | None,
) -> LayerSolution:
    """A layer's solution from the modules that hold it, in the order of its columns.

    `moved`: what the header says of its bias. InputError where the stored numbers are none of this layer's. `moved`
    is (N,)."""
    found = [_part(layer, module, stored, moved) for module, stored in parts]
    match layer:
        case W4A4Plan():
            return _columns_joined(layer, [_w4a4(part) for part in found])
        case W4A16Plan() | RotatedPlan():
            return found[0]


def _part(
    layer: LayerPlan, module: StoredModule, stored: LayerSolution, moved: Tensor | None
) -> LayerSolution:
    indices = stored_rows(module)
    stored = _reordered(stored, None if indices is None else inverse(indices))
    rows = rows_of(layer, module)
    match stored:
        case W4A4Solution():
            bias = source_bias(layer, module, stored, rows, shift_offset(module, stored), moved)
            return _cut(layer, module, stored, rows, bias)
        case W4A16Solution():
            if not isinstance(layer, W4A16Plan):
                raise InputError(f"{layer.name}: stored as W4A16, planned as W4A4", where=layer.name)
            bias = source_bias(layer, module, stored, rows, one_offset(module), moved)
            return W4A16Solution(layer, stored.codes, stored.scales, stored.zeros, bias)
        case RotatedSolution():
            if not isinstance(layer, RotatedPlan):
                raise InputError(f"{layer.name}: stored rotated, planned otherwise", where=layer.name)
            return _rotated_rows(stored, layer, rows)


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
            f"{module.name}: this format stores one outer scale for the module, but {parts[0].plan.name} has one "
            "per row",
            where=parts[0].plan.name,
        )
    for part in parts[1:]:
        if not same_bits(part.outer, outers[0]):
            raise not_together(module, parts[0].plan.name, part.plan.name, "outer scales")
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


def _rotated_stack(plan: RotatedPlan, parts: list[RotatedSolution]) -> RotatedSolution:
    """The rows of all layers under one another. They read one input; nothing else ties them."""
    row_scales = [part.row_scales for part in parts if part.row_scales is not None]
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) not in (0, len(parts)):
        raise UsageError(f"{plan.name}: only some of its layers have a bias", where=plan.name)
    return RotatedSolution(
        plan=plan,
        codes=torch.cat([part.codes for part in parts]),
        scales=join([part.scales for part in parts]),
        row_scales=torch.cat(row_scales) if row_scales else None,
        bias=torch.cat(biases) if biases else None,
    )


def _rotated_rows(stored: RotatedSolution, layer: RotatedPlan, rows: slice) -> RotatedSolution:
    """One layer's rows of a module in stacked order."""
    return RotatedSolution(
        plan=layer,
        codes=stored.codes[rows].contiguous(),
        scales=stored.scales[rows].contiguous(),
        row_scales=None if stored.row_scales is None else stored.row_scales[rows].clone(),
        bias=None if stored.bias is None else stored.bias[rows].clone(),
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
        case RotatedSolution():
            return replace(
                solution,
                codes=take_rows(solution.codes, indices),
                scales=take_rows(solution.scales, indices),
                row_scales=moved(solution.row_scales),
                bias=moved(solution.bias),
            )


def _w4a4(solution: LayerSolution) -> W4A4Solution:
    if not isinstance(solution, W4A4Solution):
        raise ValueError(f"{solution.plan.name} is not a W4A4 layer")
    return solution


def _rotated(solution: LayerSolution) -> RotatedSolution:
    if not isinstance(solution, RotatedSolution):
        raise ValueError(f"{solution.plan.name} is not a rotated layer")
    return solution


def _w4a16(solution: LayerSolution) -> W4A16Solution:
    if not isinstance(solution, W4A16Solution):
        raise ValueError(f"{solution.plan.name} is not a W4A16 layer")
    return solution
