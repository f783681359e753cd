"""What an output format promises, and the checks that all formats share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts.layout import ModelLayout
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
from svdq_cli.storage.tensor_file import TensorSpec

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_SHOWN = 8  # names in a message; the others are counted


@dataclass(frozen=True, slots=True)
class PackedFacts:
    """What a checkpoint's metadata says about its quantized layers; their sizes stand in the tensors."""

    w4a4: tuple[str, ...]
    w4a16: tuple[str, ...]
    precision: Precision | None  # None without W4A4 layers, and so is the rank
    rank: int | None
    dtype: torch.dtype | None  # of everything that is stored in 16 bits; None where only the tensors say it


@dataclass(frozen=True, slots=True)
class Traits:
    """What a runtime wants of one stored module beyond the sizes in its plan."""

    row_scales: bool = False  # nvfp4: an outer scale per row instead of one per tensor
    unsigned: bool = False  # int4: the runtime adds GELU_SHIFT to the activation and quantizes it to 0..15
    engine_names: bool = False  # the C++ engine's spelling of tensor names


PLAIN = Traits()


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The low-rank branch of a layer, or of a stored module: (x down^T) up^T."""

    down: Tensor  # (R, K) 16-bit
    up: Tensor  # (N, R) 16-bit

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Objection(Protocol):
    def __call__(self, layer: LayerPlan) -> str | None: ...


class TensorSpecs(Protocol):
    def __call__(
        self, layer: LayerPlan, dtype: torch.dtype, traits: Traits = PLAIN
    ) -> dict[str, TensorSpec]: ...


class Encode(Protocol):
    def __call__(self, solution: LayerSolution, traits: Traits = PLAIN) -> dict[str, Tensor]: ...


class Decode(Protocol):
    def __call__(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: Traits = PLAIN
    ) -> LayerSolution: ...


class EncodeBranch(Protocol):
    def __call__(self, branch: Branch, traits: Traits = PLAIN) -> dict[str, Tensor]: ...


class DecodeBranch(Protocol):
    def __call__(self, tensors: Mapping[str, Tensor], traits: Traits = PLAIN) -> Branch: ...


@dataclass(frozen=True, slots=True)
class Format:
    """One file layout that some runtime loads: the bits of one stored module, and what the file says about itself.

    A stored module is a source layer, or several stacked by the family's layout (`formats.modules`). Tensors are named
    by the suffix of their key, such as "qweight".
    """

    name: str
    single_file: bool  # one .safetensors, whose header holds the metadata; else a component folder
    own_names: bool  # modules are those of diffusers, so that no family needs a layout
    mixes: bool  # a layer that the format or the plan leaves at 16 bits has a place among quantized ones
    precisions: tuple[Precision, ...]
    unsigned_after_gelu: bool  # int4 modules fed by a plain GELU read unsigned activations
    one_rank: bool  # the file says one rank for all W4A4 modules

    # Why the format can't hold this module ("out_features 200 is not a multiple of 128"), or None.
    objection: Objection

    # The exact key set of a module with shapes and dtypes; `dtype` is that of what stays 16-bit.
    tensor_specs: TensorSpecs

    # decode(s.plan, encode(s)) is s, bit for bit. encode raises ValueError for a solution that contradicts
    # its plan, decode InputError for tensors that do.
    encode: Encode
    decode: Decode

    # The same for the branch of a W4A4 module alone, in the stored order of its rows: two of the tensors above.
    encode_branch: EncodeBranch
    decode_branch: DecodeBranch

    # What tells the runtime what is quantized: the `quantization_config` object, or the header's metadata.
    # UsageError where the plan does not fit. The plan is that of the file: its layers are stored modules.
    metadata: Callable[[ModelPlan, torch.dtype], dict[str, object]]

    # What the runtime builds the model from, by the layout and the diffusers config.
    model_metadata: Callable[[ModelLayout | None, Mapping[str, object]], dict[str, object]]

    # The inverse in two steps, neither of which reads a weight: layer_plans takes the specs of all tensors by
    # full name and returns the stored modules. Both raise InputError.
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


def no_model_metadata(layout: ModelLayout | None, config: Mapping[str, object]) -> dict[str, object]:
    """For runtimes that read nothing about the model but its own config."""
    return {}


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


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
