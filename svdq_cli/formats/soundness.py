"""Checks that all formats share: of shapes, dtypes and numbers, and of plans that a file could not say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerSolution,
    NvFp4,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Solution,
)
from svdq_cli.storage.tensor_file import TensorSpec

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_SHOWN = 8  # names in a message; the others are counted


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The specs of tensors that exist."""
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def differences(expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Every way in which `found` departs from `expected`, as a clause each; empty where they agree."""
    return tuple(_differences(expected, found))


def require_specs(layer: str, expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    """InputError that names the layer and every wrong tensor, unless both agree exactly."""
    if wrong := differences(expected, found):
        raise InputError(
            f"{layer}: {'; '.join(wrong)}",
            where=layer,
            hint="the file is damaged, incomplete, or in the layout of another format",
        )


def require_sound_tensors(
    layer: LayerPlan, specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]
) -> None:
    """InputError unless the stored tensors of a module are exactly those, with finite numbers in them."""
    require_specs(layer.name, specs, specs_of(tensors))
    if wrong := unsound_numbers(tensors):
        raise InputError(f"{layer.name}: {'; '.join(wrong)}", where=layer.name)


def require_16_bit(format_name: str, dtype: torch.dtype) -> None:
    """UsageError for a dtype that the 4-bit kernels do not compute in."""
    if dtype not in SIXTEEN_BIT:
        raise UsageError(f"{format_name} stores bfloat16 or float16, not {dtype_name(dtype)}")


def require_one_value(
    format_name: str, what: str, layers: Sequence[W4A4Plan], value_of: Callable[[W4A4Plan], Hashable]
) -> None:
    """UsageError that names the layers whose value is not the common one, for formats that store one per file."""
    by_value: dict[Hashable, list[str]] = defaultdict(list)
    for layer in layers:
        by_value[value_of(layer)].append(layer.name)
    if len(by_value) < 2:
        return
    common, *others = sorted(by_value, key=lambda value: len(by_value[value]), reverse=True)
    named = "; ".join(f"{what} {value}: {_some(by_value[value])}" for value in others)
    raise UsageError(
        f"{format_name} stores one {what} per file; {len(by_value[common])} layers have {what} {common}, "
        f"but {named}",
        hint=f"give all W4A4 layers the same {what}",
        where=by_value[others[0]][0],
    )


def outer_of_both(layer: str, tensor_scale: Tensor, row_scales: Tensor) -> Tensor:
    """One outer scale, (1,) or (N,), where a runtime multiplies by both. InputError if 16 bits can't hold it."""
    if bool((row_scales == 1).all()):
        return tensor_scale.clone()
    product = row_scales.double() * tensor_scale.double()
    outer = product.to(row_scales.dtype)
    if not torch.equal(outer.double(), product):
        raise InputError(
            f"{layer}: wtscale and wcscales are both in use, and {outer.dtype} can't hold their product",
            where=layer,
            hint="quantize the layer again with one kind of outer scale",
        )
    return outer


def sixteen_bit_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The 16-bit dtype that most of a module's tensors have, so that an error names the one that differs."""
    seen = Counter(tensor.dtype for tensor in tensors.values() if tensor.dtype in SIXTEEN_BIT)
    return seen.most_common(1)[0][0] if seen else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def require_sound(solution: LayerSolution) -> None:
    """ValueError unless shapes, dtypes and numbers are those that `records` promises for the plan."""
    plan, tensors = solution.plan, _tensors_of(solution)
    match solution:
        case W4A4Solution():
            dtype = solution.smooth.dtype
        case W4A16Solution():
            dtype = solution.scales.dtype
        case RotatedSolution(bias=bias):
            dtype = torch.bfloat16 if bias is None else bias.dtype
    if dtype not in SIXTEEN_BIT:
        raise ValueError(f"{plan.name}: {dtype} is not a 16-bit dtype")
    wrong = differences(_natural_specs(solution, dtype), specs_of(tensors)) or unsound_numbers(tensors)
    if wrong:
        raise ValueError(f"{plan.name}: {'; '.join(wrong)}")


def unsound_numbers(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A clause for every floating tensor with NaN or infinity in it, and for a smooth factor with a zero."""
    return tuple(_unsound_numbers(tensors))


def _differences(expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> Iterator[str]:
    for name in sorted(expected.keys() - found.keys()):
        yield f"{name} is missing"
    for name in sorted(found.keys() - expected.keys()):
        yield f"{name} does not belong here"
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name].shape:
            yield f"{name} has the shape {found[name].shape} instead of {expected[name].shape}"
        if found[name].dtype != expected[name].dtype:
            yield f"{name} has the dtype {found[name].dtype} instead of {expected[name].dtype}"


def _unsound_numbers(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.float()
        if bad := int((~values.isfinite()).sum()):
            yield f"{name} holds {bad} values that are not finite"
        if name.startswith("smooth") and (zeros := int((values == 0).sum())):
            yield f"{name} holds {zeros} zeros, but the activation is divided by it"


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _tensors_of(solution: LayerSolution) -> dict[str, Tensor]:
    names = [name for name in type(solution).__dataclass_fields__ if name != "plan"]
    return {name: tensor for name in names if (tensor := getattr(solution, name)) is not None}


def _natural_specs(solution: LayerSolution, dtype: torch.dtype) -> dict[str, TensorSpec]:
    linear = solution.plan.linear
    rows, columns = linear.out_features, linear.in_features
    match solution:
        case W4A4Solution(plan=plan):
            groups = columns // plan.precision.group
            specs = {
                "smooth": TensorSpec((columns,), dtype),
                "down": TensorSpec((plan.rank, columns), dtype),
                "up": TensorSpec((rows, plan.rank), dtype),
                "codes": TensorSpec((rows, columns), torch.int8),
                "scales": TensorSpec((rows, groups), scale_dtype(plan, dtype)),
            }
            if isinstance(plan.precision, NvFp4):
                per_row = solution.outer is not None and solution.outer.numel() > 1
                specs["outer"] = TensorSpec((rows,) if per_row else (1,), dtype)
        case W4A16Solution(plan=plan):
            groups = columns // plan.group
            specs = {
                "codes": TensorSpec((rows, columns), torch.uint8),
                "scales": TensorSpec((rows, groups), dtype),
                "zeros": TensorSpec((rows, groups), dtype),
            }
        case RotatedSolution(plan=plan):
            specs = {"codes": TensorSpec((rows, columns), torch.int8)}
            if plan.activation_bits == 4:
                specs["scales"] = TensorSpec((rows, 1), torch.float32)
            else:
                specs["scales"] = TensorSpec((rows, columns // plan.group), torch.float8_e4m3fn)
                specs["row_scales"] = TensorSpec((rows,), torch.float32)
    if linear.bias:
        specs["bias"] = TensorSpec((rows,), dtype)
    return specs


def scale_dtype(plan: W4A4Plan, dtype: torch.dtype) -> torch.dtype:
    """What a W4A4 layer's group scales are stored in: `dtype` for int4, e4m3 for nvfp4."""
    match plan.precision:
        case Int4():
            return dtype
        case NvFp4():
            return torch.float8_e4m3fn
