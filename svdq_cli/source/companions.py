"""Text encoders and autoencoder in a whole checkpoint, next to the diffusion model.

A fine-tune has often trained them too, so they take the place of the base pipeline's. The base says which components
there are and what their tensors are called; a part of the file is used only where it has every one of them, in its
shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source.companion_names import CLIP_L, PLACES
from svdq_cli.source.folders import component_tensors, pipeline_index
from svdq_cli.source.markers import SCALED_MARKER, without_markers
from svdq_cli.source.names import Naming, claim, convert_names
from svdq_cli.source.tensors import (
    DTYPE_OF_NAME,
    SIXTEEN_BIT_OR_MORE,
    Float8Tensor,
    StoredTensor,
    TensorEntry,
)
from svdq_cli.source.upconverted import Reading, with_promised_scales

Entry = TypeVar("Entry", bound=TensorEntry)


PROJECTION = "text_projection.weight"


@dataclass(frozen=True, slots=True)
class TurnedTensor:
    """A stored tensor in another shape: a projection kept as its transpose, or a 1x1 convolution that is a linear."""

    entry: TensorEntry
    shape: tuple[int, ...]
    transposed: bool

    @property
    def file(self) -> Path:
        return self.entry.file

    @property
    def origin(self) -> str:
        return self.entry.origin

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    def read(self) -> Tensor:
        tensor = self.entry.read()
        return (tensor.T if self.transposed else tensor.reshape(self.shape)).contiguous()

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]


_SAMPLED = 24  # tensors of a component, and rows of each
# Of the numbers that are the base's, rounded to 8 bits: all but those where the base was rounded to bfloat16 from what
# the file was made of (one in a hundred). A text encoder that was trained for one epoch has half of them.
_SAME_COMPONENT = 0.95


@dataclass(frozen=True, slots=True)
class IdentityTensor:
    """The projection of a text encoder that a file has without one, in the dtype of `like`."""

    like: TensorEntry
    size: int
    origin: str = PROJECTION

    @property
    def file(self) -> Path:
        return self.like.file

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    @property
    def dtype(self) -> str:
        return self.like.dtype

    def read(self) -> Tensor:
        return torch.eye(self.size, dtype=DTYPE_OF_NAME[self.dtype])

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]


@dataclass(frozen=True, slots=True)
class Companions:
    """The base's components that a file holds, each with its tensors under the base's names; the prefixes below which
    they are stored in the file; and notes about them."""

    tensors: Mapping[str, Mapping[str, TensorEntry]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def companions_in(
    path: Path, rest: Mapping[str, Entry], base: Path | None, reading: Reading[Entry]
) -> Companions:
    """The base's components in `rest`, which is what a file holds besides the diffusion model. `reading` brings
    stored tensors to 16 bits.

    A component in fewer bits is read as the model's tensors are, unless it is the base's own, rounded, which the base
    has better. What svdq can't read stays the base's. Either is said.
    """
    if base is None:
        return Companions()
    found: dict[str, Mapping[str, TensorEntry]] = {}
    prefixes: list[str] = []
    warnings: list[str] = []
    present = pipeline_index(base)
    for prefix, component, naming in PLACES:
        stored = {name.removeprefix(prefix): rest[name] for name in rest if name.startswith(prefix)}
        if not stored or component in found or component not in present:
            continue
        if not (of_base := component_tensors(base / component)):
            continue
        weights, markers = without_markers(stored, None)
        try:
            read = reading(path, weights)
            if SCALED_MARKER in markers:
                read = with_promised_scales(path, read)
        except InputError as error:
            if error.kind != "already-quantized":
                raise
            if not _has_names_of(naming, weights, of_base):
                continue
            scheme = error.message.removeprefix(f"{path}: this model is ")
            warnings.append(_of_the_base(path, component, f"is {scheme}", base))
            prefixes.append(prefix)
            continue
        tensors = _as_base(naming, read.tensors, {name: entry.shape for name, entry in of_base.items()})
        if isinstance(tensors, str):
            if _has_names_of(naming, weights, of_base):
                warnings.append(_of_the_base(path, component, tensors, base))
                prefixes.append(prefix)
            continue
        prefixes.append(prefix)
        if read.lossy and (why := _why_the_base_is_better(tensors, of_base)):
            warnings.append(_of_the_base(path, component, why, base))
            continue
        found[component] = tensors
        warnings += [f"{component}: {warning}" for warning in read.lossy]
    return Companions(found, tuple(prefixes), tuple(warnings))


def _of_the_base(path: Path, component: str, why: str, base: Path) -> str:
    return f"{path}: the output has the {component} of {base}, not the file's, which {why}"


def _why_the_base_is_better(
    tensors: Mapping[str, TensorEntry], of_base: Mapping[str, StoredTensor]
) -> str | None:
    """Why the base's component is kept; None where the base has the component in 8 bits itself, or a different one."""
    if any(entry.dtype not in SIXTEEN_BIT_OR_MORE for entry in of_base.values()):
        return None
    eight = [name for name, entry in tensors.items() if isinstance(entry, Float8Tensor) and entry.shape]
    if not eight:
        return "is quantized"
    if _share_of_rounded(tensors, of_base, eight) < _SAME_COMPONENT:
        return None
    return "is the same one in 8 bits"


def _share_of_rounded(
    tensors: Mapping[str, TensorEntry], of_base: Mapping[str, StoredTensor], names: Sequence[str]
) -> float:
    """How many of the 8-bit numbers are the base's 16-bit ones rounded to the nearest, of some rows of some tensors."""
    same = count = 0
    for name in names[:: max(1, len(names) // _SAMPLED)]:
        entry = tensors[name]
        assert isinstance(entry, Float8Tensor)
        codes = entry.entry.read_rows(0, _SAMPLED)
        limits = torch.finfo(codes.dtype)
        wanted = of_base[name].read_rows(0, _SAMPLED).float() / entry.scale_of_rows(0, _SAMPLED)
        rounded = wanted.clamp(limits.min, limits.max).to(codes.dtype)
        same += int((rounded.float() == codes.float()).sum())
        count += codes.numel()
    return same / max(1, count)


def _has_names_of(
    naming: Naming, stored: Mapping[str, TensorEntry], of_base: Mapping[str, TensorEntry]
) -> bool:
    """Whether these are tensors of that component: quantizers leave the names of norms and embeddings as they are."""
    try:
        converted, _ = convert_names(naming, stored)
    except ValueError:  # a fused matrix in a packed shape, which has such a name
        return True
    return any(name in of_base or name.removeprefix("text_model.") in of_base for name in converted)


def _as_base(
    naming: Naming, stored: Mapping[str, TensorEntry], wanted: Mapping[str, tuple[int, ...]]
) -> Mapping[str, TensorEntry] | str:
    """The stored tensors under the base's names; why not, where the base has one that they lack, or in another shape.

    Positions that old bases hold are no weights: transformers counts them itself.
    """
    wanted = {name: shape for name, shape in wanted.items() if not name.endswith("position_ids")}
    try:
        # what is left over (position ids, logit scales) is not a weight
        converted, _ = convert_names(naming, stored)
    except ValueError as error:
        return f"can't be read: {error}"
    converted = _with_projection(converted, wanted.get(PROJECTION), or_identity=naming is CLIP_L)
    if not any(name.startswith("text_model.") for name in wanted):
        # transformers 5.6 and later save CLIPTextModel without its wrapper's name
        wrapped, converted = converted, {}
        for name, entry in wrapped.items():
            claim(converted, name.removeprefix("text_model."), entry)
    tensors = {name: _shaped(converted[name], shape) for name, shape in wanted.items() if name in converted}
    for name, shape in wanted.items():
        if name not in tensors:
            return f"lacks {name}"
        if tensors[name].shape != shape:
            return f"has {name} of {list(tensors[name].shape)} (the base's is of {list(shape)})"
    return tensors


def _with_projection(
    converted: Mapping[str, TensorEntry], wanted: tuple[int, ...] | None, *, or_identity: bool
) -> dict[str, TensorEntry]:
    """OpenCLIP's bare projection turned; `or_identity`, which diffusers and ComfyUI take where there is none."""
    tensors = dict(converted)
    bare = tensors.pop("text_projection", None)
    if bare is not None and len(bare.shape) == 2:
        claim(tensors, PROJECTION, TurnedTensor(bare, (bare.shape[1], bare.shape[0]), transposed=True))
    norm = tensors.get("text_model.final_layer_norm.weight")
    if (
        or_identity
        and PROJECTION not in tensors
        and norm is not None
        and wanted == (*norm.shape, *norm.shape)
    ):
        tensors[PROJECTION] = IdentityTensor(norm, norm.shape[0])
    return tensors


def _shaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    """LDM's autoencoder has 1x1 convolutions for diffusers' linears."""
    if len(entry.shape) == 4 and entry.shape[2:] == (1, 1) and entry.shape[:2] == shape:
        return TurnedTensor(entry, shape, transposed=False)
    return entry
