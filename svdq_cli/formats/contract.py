"""What an output format promises, and the checks that all formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerSolution,
    ModelPlan,
    NvFp4,
    Precision,
    W4A4Plan,
    W4A4Solution,
    W4A16Solution,
)

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor before its numbers exist."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PackedFacts:
    """What a checkpoint's metadata says about its quantized layers; their sizes stand in the tensors."""

    w4a4: tuple[str, ...]
    w4a16: tuple[str, ...]
    precision: Precision | None  # None without W4A4 layers, and so is the rank
    rank: int | None
    dtype: torch.dtype  # of everything that is stored in 16 bits


@dataclass(frozen=True, slots=True)
class Format:
    """One file layout that some runtime loads. Tensors are named by the suffix of their key, such as "qweight"."""

    name: str

    # Why the format can't hold this layer ("out_features 200 is not a multiple of 128"), or None.
    objection: Callable[[LayerPlan], str | None]

    # The exact key set of a layer with shapes and dtypes; the argument is the dtype of what stays 16-bit.
    tensor_specs: Callable[[LayerPlan, torch.dtype], dict[str, TensorSpec]]

    # decode(s.plan, encode(s)) is s, bit for bit. encode raises ValueError for a solution that contradicts
    # its plan, decode InputError for tensors that do.
    encode: Callable[[LayerSolution], dict[str, Tensor]]
    decode: Callable[[LayerPlan, Mapping[str, Tensor]], LayerSolution]

    # The JSON object that tells the runtime what is quantized. UsageError where the plan does not fit.
    metadata: Callable[[ModelPlan, torch.dtype], dict[str, object]]

    # The inverse in two steps, neither of which reads a weight: layer_plans takes the specs of all tensors by
    # full name. Both raise InputError.
    parse_metadata: Callable[[Mapping[str, object]], PackedFacts]
    layer_plans: Callable[[PackedFacts, Mapping[str, TensorSpec]], tuple[LayerPlan, ...]]

    # Whether a path holds a checkpoint of this format. Never raises for what is merely something else.
    sniff: Callable[[Path], bool]


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


def require_sound(solution: LayerSolution) -> None:
    """ValueError unless shapes, dtypes and numbers are those that `records` promises for the plan."""
    plan, tensors = solution.plan, _tensors_of(solution)
    dtype = solution.scales.dtype if isinstance(solution, W4A16Solution) else solution.smooth.dtype
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
            yield f"{name} holds {zeros} zeros, and the activation is divided by it"


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
