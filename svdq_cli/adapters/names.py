"""Where an adapter's layers are in a model, under whatever names its trainer gave them.

Names are resolved against the model itself: under its diffusers names, its original names, either of them with dots
replaced by underscores (kohya), or by the number that a layer has in the model (cloneofsimo).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.source.configs import class_of_names
from svdq_cli.source.denoisers import by_component, prefix_of
from svdq_cli.source.names import Part, RowRange, original_layers
from svdq_cli.source.original_names import naming_of
from svdq_cli.source.prefixes import TRANSPARENT, WRAPPERS

Places = Mapping[str, tuple[Part, ...]]
"""By the names that an adapter may call a layer by: the model's layers, or rows of layers, that it means."""

_WHOLE = (RowRange(0, 1, 1),)
# Prefixes of a layer's name: a trainer's word for the denoiser, and what wrappers put around a model. Some files
# have several of them, in any order.
_PREFIXES = (
    *(
        "lora_unet_",
        "lora_transformer_",
        "lora_dit_",
        "lycoris_",
        "unet_",
        "transformer_",
        "diffusion_model_",
    ),
    *(
        f"{word}."
        for word in (
            *("lora_unet", "lora_transformer", "lycoris", "lora", "pipeline", "conditional_transformer"),
            *sorted(WRAPPERS),
        )
    ),
)
_MOST_PREFIXES = 8
# What wrappers put between the parts of a name, wherever they are
_WRAPPED = re.compile(rf"\b(?:{'|'.join(sorted(TRANSPARENT))})\.|(?<=_)_orig_mod_")
# Attention processors of older trainers have names of their own: XLabs' for FLUX, diffusers' for UNets
_PROCESSORS = (
    (re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1"), r"\1.img_attn.\2"),
    (re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2"), r"\1.txt_attn.\2"),
    (re.compile(r"(single_blocks\.\d+)\.processor\.proj$"), r"\1.linear2"),
    (re.compile(r"\.processor\.to_(q|k|v)"), r".to_\1"),
    (re.compile(r"\.processor\.to_out"), r".to_out.0"),
)
_OTHER_PARTS = {
    "text encoders": re.compile(
        r"^(?:base_model\.model\.|pipe\.)*(lora_te\d?_|te\d?_|lora_te\d?\.|text_encoder(_\d)?[.:]|text_encoders\."
        r"|clip_[lg]\.|t5xxl\.|cond_stage_model\.|conditioner\.|bundle_emb\.|<[^>]+>$)"
    ),
    # between text encoders and denoiser: those of LTX-2, and Anima's adapter of its language model
    "connectors": re.compile(
        r"^(?:diffusion_model\.|lora_unet_|lycoris_)?(?:llm_adapter[._]|text_conditioner[._]|connectors\."
        r"|text_embedding_projection[._]|(?:video|audio)_embeddings_connector[._])"
    ),
}
_INDEXED = re.compile(r"^unet:(\d+):(up|down)$")
# The linears of a UNet's transformer block by the class that cloneofsimo's trainer looked for, in the order in which
# diffusers of that time (0.3 to 0.11) registered them: the feed-forward stood between the two attentions.
_INDEXED_LAYERS = (
    ("CrossAttention", ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")),
    ("GEGLU", ("ff.net.0.proj",)),
    ("CrossAttention", ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")),
)
_UNET_STACKS = ("down_blocks", "up_blocks", "mid_block")  # as they are registered


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The model that an adapter is for: its tensors under diffusers' names, with their shapes."""

    path: Path
    class_name: str
    shapes: Mapping[str, tuple[int, ...]]
    component: str = "transformer"
    # of a pipeline with several denoisers: the others, whose layers' names carry their own name as a prefix
    further: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all denoisers, in order."""
        return (self.component, *self.further)


def part_of(key: str) -> str | None:
    """The part of a pipeline, other than its denoisers, that a key's adapter or a token's trained embedding is of; None
    where it is of a denoiser."""
    return next((name for name, pattern in _OTHER_PARTS.items() if pattern.match(key)), None)


def places_of(model: ModelShapes, chosen: str | None = None, *, by_heads: bool = False) -> Places:
    """Every name that an adapter may call a layer of the model by, and the layers (or rows of layers) it means.

    `chosen`: the denoiser that it is for, where the model has several. Without it, names that name none are of the
    first. `by_heads`: whether fused queries, keys and values are head by head (see `Naming`)."""
    places: dict[str, tuple[Part, ...]] = {}
    named: dict[str, tuple[Part, ...]] = {}
    for component, shapes in by_component(model.components, model.shapes).items():
        if chosen not in (None, component):
            continue
        prefix = prefix_of(model.components, component)
        for name, parts in _places_in(model.class_name, shapes, by_heads=by_heads).items():
            there = tuple(Part(prefix + part.target, part.rows) for part in parts)
            named |= {f"{component}.{name}": there, f"{component}_{name}": there}
            if component == (chosen or model.component):
                places[name] = there
    return {**named, **places}


def names_denoiser(keys: Iterable[str], model: ModelShapes) -> bool:
    """Whether any key of an adapter names one of the model's denoisers. The first does not count: its name is the word
    that trainers use for whatever they train."""
    marks = tuple(f"{component}{mark}" for component in model.further for mark in "._")
    return any(bare.startswith(marks) for key in keys for bare in _without_prefixes(_WRAPPED.sub("", key)))


def _places_in(class_name: str, shapes: Mapping[str, tuple[int, ...]], *, by_heads: bool) -> Places:
    """The places of one component, by names without it. Its class tells the original names or, where that has none of
    its own, the class that has the same names."""
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    dotted: dict[str, tuple[Part, ...]] = {layer: (Part(layer, _WHOLE),) for layer in layers}
    known = class_of_names(shapes)
    naming = naming_of(class_name) or (naming_of(known.model_class) if known is not None else None)
    if naming is not None:
        for original, parts in original_layers(naming, layers).items():
            mixed = by_heads and naming.by_heads is not None and original.endswith(f".{naming.by_heads}")
            dotted.setdefault(original, _head_by_head(parts, shapes) if mixed else parts)
    dotted |= _single_block_attention(dotted)
    flat = {name.replace(".", "_"): parts for name, parts in dotted.items()}
    return {**flat, **dotted}


def _head_by_head(parts: tuple[Part, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """Queries, keys and values whose rows follow one another for each head: first all of the first head's."""
    first = parts[0].target
    width = shapes[f"{first.rpartition('.')[0]}.norm_q.weight"][0]
    pieces = len(parts) * (shapes[f"{first}.weight"][0] // width)
    return tuple(
        Part(part.target, tuple(RowRange(at, at + 1, pieces) for at in range(index, pieces, len(parts))))
        for index, part in enumerate(parts)
    )


def find_place(places: Places, name: str) -> tuple[Part, ...] | None:
    """What a layer of an adapter is in the model; None where it has no such layer."""
    return next((places[candidate] for candidate in _candidates(name) if candidate in places), None)


def named_by_index(
    keys: Mapping[str, object], metadata: Mapping[str, str], model: ModelShapes
) -> dict[str, str]:
    """cloneofsimo's numbered keys (`unet:12:down`) -> the same keys with the layers' names.

    Raises ValueError where the model has another number of such layers than the file.
    """
    indexed = {key: found for key in keys if (found := _INDEXED.match(key))}
    if not indexed:
        return {}
    layers = _indexed_layers(metadata, model)
    count = 1 + max(int(found[1]) for found in indexed.values())
    if count != len(layers):
        raise ValueError(f"it numbers {count} layers, but the model has {len(layers)} layers of that kind")
    return {key: f"{layers[int(found[1])]}.lora_{found[2]}.weight" for key, found in indexed.items()}


def _indexed_layers(metadata: Mapping[str, str], model: ModelShapes) -> list[str]:
    """The layers that cloneofsimo's trainer numbers, in its order."""
    try:
        searched = set(json.loads(metadata["unet"]))
    except (KeyError, TypeError, json.JSONDecodeError):
        searched = {"CrossAttention", "GEGLU"}  # what the trainer looks for unless it is told otherwise
    in_block = [layer for parent, layers in _INDEXED_LAYERS if parent in searched for layer in layers]
    blocks = {name.split(".attn1.")[0] for name in model.shapes if ".attn1." in name}
    return [
        f"{block}.{layer}"
        for block in sorted(blocks, key=_unet_order)
        for layer in in_block
        if f"{block}.{layer}.weight" in model.shapes
    ]


def _unet_order(block: str) -> tuple[int, tuple[int, ...]]:
    stack, *rest = block.split(".")
    rank = _UNET_STACKS.index(stack) if stack in _UNET_STACKS else len(_UNET_STACKS)
    return rank, tuple(int(part) for part in rest if part.isdigit())


def _single_block_attention(dotted: Mapping[str, tuple[Part, ...]]) -> dict[str, tuple[Part, ...]]:
    """XLabs adapts q, k, v of FLUX's single blocks without the MLP that is fused with them."""
    thirds = tuple((RowRange(index, index + 1, 3),) for index in range(3))
    return {
        f"{found[1]}.processor.qkv": tuple(
            Part(part.target, rows) for part, rows in zip(parts[:3], thirds, strict=True)
        )
        for original, parts in dotted.items()
        if (found := re.fullmatch(r"(single_blocks\.\d+)\.linear1", original)) and len(parts) == 4
    }


def _candidates(name: str) -> Iterator[str]:
    """The names that a layer may have in the model, from its name in an adapter."""
    for bare in _without_prefixes(_WRAPPED.sub("", name)):
        yield bare
        yield _with_own_names(bare)


def _without_prefixes(name: str) -> Iterator[str]:
    """The name, and what is left of it with one prefix off after the other."""
    yield name
    for _ in range(_MOST_PREFIXES):
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return
        name = name.removeprefix(prefix)
        yield name


def _with_own_names(name: str) -> str:
    for pattern, replacement in _PROCESSORS:
        name = pattern.sub(replacement, name)
    return name
