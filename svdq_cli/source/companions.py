"""Text encoders and autoencoder in a whole checkpoint, next to the diffusion model.

A fine-tune has often trained them too, so they take the place of the base pipeline's. The base says which components
there are and what their tensors are called; a part of the file is used only where it has every one of them, in its
shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source.folders import component_tensors, pipeline_index
from svdq_cli.source.markers import without_markers
from svdq_cli.source.names import (
    Naming,
    Rule,
    block_numbers,
    claim,
    convert_names,
    expanded,
    fused,
    numbered,
    renamed,
)
from svdq_cli.source.tensors import SIXTEEN_BIT_OR_MORE, Float8Tensor, StoredTensor, TensorEntry
from svdq_cli.source.upconverted import Reading

Entry = TypeVar("Entry", bound=TensorEntry)


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


# ------------------------------------------------------------------------------------------------- names


_OPEN_CLIP = (
    renamed("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    renamed("token_embedding", "text_model.embeddings.token_embedding"),
    renamed("ln_final", "text_model.final_layer_norm"),
    renamed("text_projection", "text_projection.weight"),
    *(
        fused(
            f"transformer.resblocks.{{}}.attn.in_proj_{suffix}",
            *(f"text_model.encoder.layers.{{}}.self_attn.{x}_proj.{suffix}" for x in "qkv"),
        )
        for suffix in ("weight", "bias")
    ),
    *(
        renamed(f"transformer.resblocks.{{}}.{old}", f"text_model.encoder.layers.{{}}.{new}")
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
    ),
)
_VAE_RESNET = ("norm1", "conv1", "norm2", "conv2")
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


def _vae_resnet(original: str, target: str) -> tuple[Rule, ...]:
    same = tuple(renamed(f"{original}.{name}", f"{target}.{name}") for name in _VAE_RESNET)
    return (*same, renamed(f"{original}.nin_shortcut", f"{target}.conv_shortcut"))


def _vae_rules(keys: Sequence[str]) -> tuple[Rule, ...]:
    """LDM counts the decoder's stages from the image inwards, diffusers from the latents outwards."""
    rules = [renamed(name, name) for name in ("quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        rules += [renamed(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out")]
        rules.append(renamed(f"{half}.norm_out", f"{half}.conv_norm_out"))
        for number in (1, 2):
            rules += _vae_resnet(f"{half}.mid.block_{number}", f"{half}.mid_block.resnets.{number - 1}")
        attention = f"{half}.mid_block.attentions.0"
        rules += [renamed(f"{half}.mid.attn_1.{old}", f"{attention}.{new}") for old, new in _VAE_ATTENTION]
    for stage in block_numbers(keys, "encoder.down.{}", "encoder.down_blocks.{}"):
        rules += _vae_stage(keys, f"encoder.down.{stage}", f"encoder.down_blocks.{stage}", "downsample")
    stages = block_numbers(keys, "decoder.up.{}", "decoder.up_blocks.{}")
    for stage in stages:
        target = f"decoder.up_blocks.{stages[-1] - stage}"
        rules += _vae_stage(keys, f"decoder.up.{stage}", target, "upsample")
    return tuple(rules)


def _vae_stage(keys: Sequence[str], original: str, target: str, sampler: str) -> list[Rule]:
    rules = [renamed(f"{original}.{sampler}.conv", f"{target}.{sampler}rs.0.conv")]
    for number in block_numbers(keys, f"{original}.block.{{}}", f"{target}.resnets.{{}}"):
        for rule in _vae_resnet(f"{original}.block.{{}}", f"{target}.resnets.{{}}"):
            rules.append(numbered(rule, number))
    return rules


def _unchanged(*names: str) -> Callable[[Sequence[str]], tuple[Rule, ...]]:
    """Checkpoints hold these text encoders under their transformers names."""
    return lambda keys: tuple(renamed(name, name) for name in names)


OPEN_CLIP = Naming("OpenCLIP", "CLIPTextModelWithProjection", frozenset(), partial(expanded, _OPEN_CLIP), {})
LDM_VAE = Naming("LDM autoencoder", "AutoencoderKL", frozenset(), _vae_rules, {})
CLIP = Naming("CLIP", "CLIPTextModel", frozenset(), _unchanged("text_model.*"), {})
T5 = Naming("T5", "T5EncoderModel", frozenset(), _unchanged("shared", "encoder.*"), {})

# Where whole checkpoints hold the parts of a pipeline: prefix in the file, component, names below the prefix
_PLACES: tuple[tuple[str, str, Naming], ...] = (
    ("first_stage_model.", "vae", LDM_VAE),
    ("vae.", "vae", LDM_VAE),
    ("cond_stage_model.transformer.", "text_encoder", CLIP),
    ("conditioner.embedders.0.transformer.", "text_encoder", CLIP),
    ("conditioner.embedders.1.model.", "text_encoder_2", OPEN_CLIP),
    ("text_encoders.clip_l.transformer.", "text_encoder", CLIP),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", T5),  # FLUX.1
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", T5),  # SD3
)


_SAMPLED = 24  # tensors of a component, and rows of each
# Of the numbers that are the base's, rounded to 8 bits: all but those where the base was rounded to bfloat16 from what
# the file was made of (one in a hundred). A text encoder that was trained for one epoch has half of them.
_SAME_COMPONENT = 0.95
PREFIXES = tuple(dict.fromkeys(prefix for prefix, _, _ in _PLACES))


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
    for prefix, component, naming in _PLACES:
        stored = {name.removeprefix(prefix): rest[name] for name in rest if name.startswith(prefix)}
        if not stored or component in found or component not in present:
            continue
        of_base = component_tensors(base / component)
        weights, _ = without_markers(stored, None)
        try:
            read = reading(path, weights)
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
        if tensors is None:
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
        codes = entry.stored.read_rows(0, _SAMPLED)
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
) -> Mapping[str, TensorEntry] | None:
    """The stored tensors under the base's names; None where the base has one that they lack, or in another shape."""
    try:
        # what is left over (position ids, logit scales) is not a weight
        converted, _ = convert_names(naming, stored)
    except ValueError:
        return None
    if not any(name.startswith("text_model.") for name in wanted):
        # transformers 5.6 and later save CLIPTextModel without its wrapper's name
        wrapped, converted = converted, {}
        for name, entry in wrapped.items():
            claim(converted, name.removeprefix("text_model."), entry)
    tensors = {
        name: _shaped(converted[name], shape, transposed=name == "text_projection.weight")
        for name, shape in wanted.items()
        if name in converted
    }
    fits = wanted and all(name in tensors and tensors[name].shape == shape for name, shape in wanted.items())
    return tensors if fits else None


def _shaped(entry: TensorEntry, shape: tuple[int, ...], *, transposed: bool) -> TensorEntry:
    """OpenCLIP stores its projection transposed; LDM's autoencoder has 1x1 convolutions for diffusers' linears."""
    if transposed and len(entry.shape) == 2:
        return TurnedTensor(entry, (entry.shape[1], entry.shape[0]), transposed=True)
    if len(entry.shape) == 4 and entry.shape[2:] == (1, 1) and entry.shape[:2] == shape:
        return TurnedTensor(entry, shape, transposed=False)
    return entry
