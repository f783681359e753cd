"""What is stored in another type than the 16 and 32 bit floats that svdq works with, and how it is read.

The scale of 8-bit floats is found here, if they have one, and multiplied in when rows are read
(`source.tensors.Float8Tensor`); 64-bit floats are rounded to 32 bits. Integers are counters and positions next to the
weights, which are left out, or the codes of a quantizer, which are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from svdq_cli.errors import InputError
from svdq_cli.source.markers import LAYER_MARKERS, SCALED_MARKER
from svdq_cli.source.quantized import already_quantized, quantizer_beside, refuse_quantized
from svdq_cli.source.tensors import (
    SIXTEEN_BIT_OR_MORE,
    Float8Tensor,
    Float64Tensor,
    StoredTensor,
    TensorEntry,
)
from svdq_cli.text import counted

Entry = TypeVar("Entry", bound=TensorEntry)

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's two spellings
_FOREIGN_SCALES = ("scale", "scales", "weight_scales", "weight.scale", "weight._scale", "w_scale", *_SCALES)
# No quantizer packs into these
_COUNTS = ("I64", "U64", "BOOL")
_INTEGERS = (*_COUNTS, "I32", "U32", "I16", "U16", "I8", "U8")


@dataclass(frozen=True, slots=True)
class Readable:
    """Tensors as floats of 16 or 32 bits; warnings of what storing them has lost; names of what is not a weight."""

    tensors: Mapping[str, TensorEntry]
    lossy: tuple[str, ...] = ()
    no_weights: tuple[str, ...] = ()

    def warnings(self, path: Path) -> tuple[str, ...]:
        if not self.no_weights:
            return self.lossy
        named = ", ".join(self.no_weights[:3]) + (", ..." if len(self.no_weights) > 3 else "")
        count = len(self.no_weights)
        return (
            *self.lossy,
            f"{path}: ignored {counted(count, 'tensor')} of integers next to the weights: {named}",
        )


# From a file's tensors to what can be read of them
Reading = Callable[[Path, Mapping[str, Entry]], Readable]


def upconverted(path: Path, stored: Mapping[str, StoredTensor]) -> Readable:
    """The tensors of a safetensors file or folder as they are read, without ComfyUI's marker of scales (which
    `with_promised_scales` looks for). Names stay as they are.

    Raises InputError (kind `already-quantized`) for tensors of fewer bits, by the quantizer's name where it has one.
    """
    refuse_quantized(path, stored)
    promised = SCALED_MARKER in stored
    stored = {name: entry for name, entry in stored.items() if name != SCALED_MARKER}
    eight = {
        name: Float8Tensor(entry, _scale_of(path, name, entry, stored))
        for name, entry in stored.items()
        if entry.dtype in FLOAT8
    }
    spent = {entry.scale.origin for entry in eight.values() if entry.scale is not None}
    tensors: dict[str, TensorEntry] = {}
    no_weights: list[str] = []
    for name, entry in stored.items():
        if name in eight:
            tensors[name] = eight[name]
        elif entry.origin in spent or name.endswith(LAYER_MARKERS):
            continue
        elif entry.dtype in SIXTEEN_BIT_OR_MORE:
            tensors[name] = entry
        elif entry.dtype == "F64":
            tensors[name] = Float64Tensor(entry)
        elif is_no_weight(name, entry):
            no_weights.append(name)
        else:
            scale = _foreign_scale(name, stored)
            how = f", {scale} goes with it" if scale else ""
            raise _quantized(path, f"{name} is stored as {entry.dtype}{how}", where=name)
    read = Readable(tensors, _float8_warning(path, eight), tuple(no_weights))
    return with_promised_scales(path, read) if promised else read


def with_promised_scales(path: Path, read: Readable) -> Readable:
    """What is read of a file with the marker SCALED_MARKER, which says that 8-bit matrices have scales; with a warning
    of those that have none: they are read as they are, as ComfyUI reads them, and may have lost theirs."""
    matrices = {
        name: entry.scale
        for name, entry in read.tensors.items()
        if isinstance(entry, Float8Tensor) and len(entry.shape) == 2 and name.endswith(".weight")
    }
    bare = [name for name, scale in matrices.items() if scale is None]
    if not bare:
        return read
    warning = (
        f"{path}: the key {SCALED_MARKER} says that 8-bit weights have scales, but {len(bare)} of "
        f"{len(matrices)} matrices have none and are read as they are: {', '.join(bare[:3])}"
        f"{', ...' if len(bare) > 3 else ''}; if their scales are lost, use the 16-bit model"
    )
    return replace(read, lossy=(*read.lossy, warning))


def is_no_weight(name: str, entry: TensorEntry) -> bool:
    """Whole numbers that are a counter, positions or a mask; not a weight in few bits, which is a matrix or called
    one."""
    if entry.dtype not in _INTEGERS or name.endswith((".weight", ".bias")):
        return False
    return entry.dtype in _COUNTS or max(entry.shape, default=1) == math.prod(entry.shape)


def _scale_of(
    path: Path, name: str, entry: StoredTensor, stored: Mapping[str, StoredTensor]
) -> StoredTensor | None:
    layer = name.removesuffix(".weight")
    if layer == name:
        return None
    scales = [stored[f"{layer}.{word}"] for word in _SCALES if f"{layer}.{word}" in stored]
    if len(scales) > 1:
        raise InputError(
            f"{path}: {scales[0].origin} and {scales[1].origin} are both present: only one of them can scale "
            f"{entry.origin}",
            hint="convert from the 16-bit model",
            where=name,
            kind="claimed-twice",
        )
    scale = scales[0] if scales else None
    if scale is None and (foreign := _foreign_scale(name, stored)):
        raise _quantized(path, f"8-bit floats with scales as {foreign}, which svdq does not read", where=name)
    if scale is None or (
        scale.dtype in (*SIXTEEN_BIT_OR_MORE, "F64") and _is_one_or_per_row(scale.shape, entry.shape)
    ):
        return scale
    raise InputError(
        f"{path}: {scale.origin} is {scale.dtype} of shape {list(scale.shape)}; svdq reads scales in "
        "floats of 16 to 64 bits, one per tensor or per output row",
        hint="convert from the 16-bit model",
        where=name,
        kind="already-quantized",
    )


def _quantized(path: Path, how: str, *, where: str) -> InputError:
    """Refused for how it is stored, by the quantizer that a config beside it names."""
    quantizer = quantizer_beside(path)
    return already_quantized(path, f"{quantizer}: {how}" if quantizer else how, where=where)


def _foreign_scale(name: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """A key next to a weight that can only be its scale, in a spelling that svdq has no reading of."""
    layer = name.removesuffix(".weight")
    return next((key for word in _FOREIGN_SCALES if (key := f"{layer}.{word}") in stored), None)


def _is_one_or_per_row(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return math.prod(scale) == 1 or (scale[:1] == weight[:1] and math.prod(scale) == weight[0])


def _float8_warning(path: Path, eight: Mapping[str, Float8Tensor]) -> tuple[str, ...]:
    if not eight:
        return ()
    scaled = sum(entry.scale is not None for entry in eight.values())
    how = f"{scaled} of them times their scale" if scaled else "they have no scales"
    return (
        f"{path}: {len(eight)} tensors are 8-bit floats and were up-converted to bfloat16 ({how}); "
        "what 8 bits have lost stays lost, so prefer the 16-bit model if there is one",
    )
