"""LoRA files: whatever trainer wrote them, which layers of a model they change, and by what low-rank matrices.

Names are resolved against the model itself: under its diffusers names, its original names, or either of them with dots
replaced by underscores (kohya). A key that finds no place is an error, never skipped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, cat, isfinite

from svdq_cli.errors import InputError
from svdq_cli.source.configs import class_of_names
from svdq_cli.source.headers import read_json, read_whole_header
from svdq_cli.source.model import Source
from svdq_cli.source.names import Part, RowRange, original_layers
from svdq_cli.source.original_names import NAMINGS
from svdq_cli.source.tensors import StoredTensor

_WHOLE = (RowRange(0, 1, 1),)

# What stands behind a layer's name: peft, diffusers' older attention processors and their `lora_layer`s, kohya
_ROLES = {
    "down": re.compile(
        r"(?:\.lora_A(?:\.\w+)?|[._]lora\d?\.down|\.lora_linear_layer\.down|\.lora_down)\.weight$"
    ),
    "up": re.compile(r"(?:\.lora_B(?:\.\w+)?|[._]lora\d?\.up|\.lora_linear_layer\.up|\.lora_up)\.weight$"),
    "alpha": re.compile(r"\.(?:lora_)?alpha$"),
}

# Adapters that are no plain LoRA. Each changes weights in a way of its own.
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?)$"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.(oft_|boft_)"),
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2)\.weight$"),
    "LoCon with a middle matrix": re.compile(r"\.lora_mid\.weight$"),
    "whole weight differences": re.compile(r"\.diff(_b)?$"),
    "LoRA with biases": re.compile(r"\.lora_B(\.\w+)?\.bias$"),
    "cloneofsimo's index names, which number layers instead of naming them": re.compile(
        r"^unet:\d+:(up|down)$"
    ),
}
_TEXT_ENCODER = re.compile(
    r"^(lora_te\d?_|te\d?_|text_encoder(_\d)?[.:]|text_encoders\.|cond_stage_model\.|conditioner\.)"
)
_KOHYA = ("lora_unet_", "lora_transformer_", "lycoris_")
_DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
# Attention processors of older trainers have names of their own: XLabs' for FLUX, diffusers' for UNets
_PROCESSORS = (
    (re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1"), r"\1.img_attn.\2"),
    (re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2"), r"\1.txt_attn.\2"),
    (re.compile(r"(single_blocks\.\d+)\.processor\.proj$"), r"\1.linear2"),
    (re.compile(r"\.processor\.to_(q|k|v)"), r".to_\1"),
    (re.compile(r"\.processor\.to_out"), r".to_out.0"),
)


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """What is added to a weight: scale * up @ down, computed in float32."""

    down: Tensor  # (R, K)
    up: Tensor  # (N, R)
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file that fits a model: its updates by diffusers tensor name, and what it says of other components."""

    path: Path
    updates: Mapping[str, LowRankUpdate]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Module:
    """One layer of an adapter file, as its keys come in."""

    name: str
    keys: dict[str, StoredTensor] = field(default_factory=dict)  # by role: down, up, alpha


def read_adapter(path: Path, *, weight: float, source: Source) -> Adapter:
    """A LoRA for `source`, `weight` times as strong as it was trained.

    Raises InputError: damaged, an adapter of another kind, made for another model, or with keys that have no place.
    """
    file, config = _files(path)
    header = read_whole_header(file)
    _refuse_other_kinds(file, header.tensors)
    model_keys = {key: entry for key, entry in header.tensors.items() if not _TEXT_ENCODER.match(key)}
    modules = _modules(file, model_keys)
    places = _places(source)
    homeless = [module for module in modules if _place(places, module.name) is None]
    if homeless:
        raise _no_place(file, source, modules, homeless)
    trained = config or _saved_config(header.metadata)
    updates: dict[str, LowRankUpdate] = {}
    for module in modules:
        parts = _place(places, module.name)
        assert parts is not None
        for name, update in _updates(file, module, parts, source, trained):
            if name in updates:
                raise _refused(file, f"two of its layers change {name}", "the file is damaged", name)
            updates[name] = LowRankUpdate(update.down, update.up, update.scale * weight)
    left = len(header.tensors) - len(model_keys)
    warnings = (f"{file}: {left} tensors are for the text encoders, which stay as they are",) if left else ()
    return Adapter(file, updates, warnings)


# ------------------------------------------------------------------------------------------------- the file


def _files(path: Path) -> tuple[Path, Mapping[str, object] | None]:
    """The weight file and the config of a peft folder; a lone file has none."""
    if path.is_dir():
        file = path / "adapter_model.safetensors"
        if not file.is_file():
            raise InputError(
                f"{path}: no adapter_model.safetensors in this folder",
                hint="give the LoRA's .safetensors file itself",
                where=str(path),
                kind="not-found",
            )
        config = path / "adapter_config.json"
        return file, read_json(config) if config.is_file() else None
    if not path.is_file():
        raise InputError(
            f"{path}: no such LoRA file",
            hint="write --lora FILE or --lora FILE:WEIGHT",
            where=str(path),
            kind="not-found",
        )
    return path, None


def _saved_config(metadata: Mapping[str, str]) -> Mapping[str, object] | None:
    """The training config that diffusers saves beside a LoRA, without the component that stands before its keys."""
    try:
        saved = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        return None
    if not isinstance(saved, dict):
        return None
    stripped = {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in saved.items()}
    return stripped or None


def _refuse_other_kinds(file: Path, keys: Mapping[str, object]) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        found = next((key for key in keys if pattern.search(key)), None)
        if found:
            raise _refused(
                file,
                f"{kind}: svdq merges plain LoRA only",
                "merge it into the model with the tool that trained it, and convert the result",
                found,
            )


def _modules(file: Path, keys: Mapping[str, StoredTensor]) -> list[_Module]:
    """Keys by layer. Raises InputError listing keys that are no part of a LoRA, and layers that lack a half."""
    modules: dict[str, _Module] = {}
    foreign: list[str] = []
    for key, entry in keys.items():
        role, name = _role(key)
        if role is None:
            foreign.append(key)
            continue
        modules.setdefault(name, _Module(name)).keys[role] = entry
    if foreign:
        raise _refused(
            file,
            f"{len(foreign)} keys are no part of a LoRA: {_some(foreign)}",
            "svdq knows the names of peft, diffusers, kohya, BFL and ComfyUI",
            foreign[0],
        )
    halves = [module.name for module in modules.values() if not {"down", "up"} <= module.keys.keys()]
    if halves:
        raise _refused(
            file, f"layers lack a half of their LoRA: {_some(halves)}", "download it again", halves[0]
        )
    if not modules:
        raise _refused(file, "holds no LoRA for the diffusion model", "give a LoRA of this model", str(file))
    return list(modules.values())


def _role(key: str) -> tuple[str | None, str]:
    """What a key is of its layer (down, up, alpha), and the layer's name."""
    for role, pattern in _ROLES.items():
        if found := pattern.search(key):
            # `to_q_lora.down`, `qkv_lora1.down`: the processor's name for its adapter, without the ending
            suffix = re.match(r"_lora\d?", found[0])
            return role, key[: found.start()] + (suffix[0] if suffix and suffix[0][-1].isdigit() else "")
    return None, key


# ------------------------------------------------------------------------------------------------- the model's layers


def _places(source: Source) -> Mapping[str, tuple[Part, ...]]:
    """Every name that an adapter may call a layer of the model by, and the layers (or rows of layers) it means."""
    layers = [name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight")]
    dotted: dict[str, tuple[Part, ...]] = {layer: (Part(layer, _WHOLE),) for layer in layers}
    known = class_of_names(source.tensors)
    naming = next((n for n in NAMINGS if known is not None and n.model_class == known.model_class), None)
    if naming is not None:
        for original, parts in original_layers(naming, layers).items():
            dotted.setdefault(original, parts)
    dotted |= _single_block_attention(dotted)
    flat = {name.replace(".", "_"): parts for name, parts in dotted.items()}
    return {**flat, **dotted}


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


def _place(places: Mapping[str, tuple[Part, ...]], name: str) -> tuple[Part, ...] | None:
    return next((places[candidate] for candidate in _candidates(name) if candidate in places), None)


def _candidates(name: str) -> Iterator[str]:
    """The names that a layer may have in the model, from its name in an adapter."""
    for prefix in _KOHYA:
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
    for prefix in _DOTTED:
        name = name.removeprefix(prefix)
    yield name
    for pattern, replacement in _PROCESSORS:
        name = pattern.sub(replacement, name)
    yield name


def _no_place(file: Path, source: Source, modules: list[_Module], homeless: list[_Module]) -> InputError:
    names = _some([module.name for module in homeless])
    model = source.config.get("_class_name", source.path)
    if len(homeless) == len(modules):
        return _refused(
            file,
            f"made for another model: none of its {len(modules)} layers is in {model}, for example {names}",
            "give a LoRA that was trained on this model's family",
            homeless[0].name,
            kind="lora-mismatch",
        )
    return _refused(
        file,
        f"{len(homeless)} of its {len(modules)} layers are not in {model}: {names}",
        "the LoRA was trained on a variant of the model; svdq merges all of it or nothing",
        homeless[0].name,
        kind="lora-mismatch",
    )


# ------------------------------------------------------------------------------------------------- the numbers


def _updates(
    file: Path, module: _Module, parts: tuple[Part, ...], source: Source, trained: Mapping[str, object] | None
) -> Iterator[tuple[str, LowRankUpdate]]:
    """A module's share of each tensor that it changes. Raises InputError where sizes disagree or a value is NaN."""
    down = module.keys["down"].read().flatten(1)
    up = module.keys["up"].read().flatten(1)
    rank = down.shape[0]
    if not bool(isfinite(down).all() and isfinite(up).all()):
        raise _refused(
            file, f"{module.name} holds NaN or infinite values", "use another LoRA", module.name, "not-finite"
        )
    scale = _scale(module, rank, trained)
    for part in parts:
        name = f"{part.target}.weight"
        shape = source.tensors[name].shape
        try:
            ranges = [rows.among(up.shape[0]) for rows in part.rows]
        except ValueError:
            ranges = []
        rows = sum(stop - start for start, stop in ranges)
        if up.shape[1] != rank or rows != shape[0] or down.shape[1] != math.prod(shape[1:]):
            raise _refused(
                file,
                f"{module.name} has matrices {list(up.shape)} and {list(down.shape)}, {name} has shape {list(shape)}",
                "the LoRA was trained on another variant of the model",
                module.name,
                kind="lora-mismatch",
            )
        yield name, LowRankUpdate(down, cat([up[start:stop] for start, stop in ranges]), scale)


def _scale(module: _Module, rank: int, trained: Mapping[str, object] | None) -> float:
    """alpha / rank; an adapter that says no alpha is scaled by 1, as its trainers do."""
    if "alpha" in module.keys:
        return float(module.keys["alpha"].read().float().reshape(())) / rank
    if trained is None:
        return 1.0
    alpha = _of_module(trained.get("alpha_pattern"), module.name, trained.get("lora_alpha", rank))
    return float(str(alpha)) / (rank**0.5 if trained.get("use_rslora") else rank)


def _of_module(pattern: object, name: str, default: object) -> object:
    """peft's per-layer values: the first whose key ends the layer's name."""
    if isinstance(pattern, Mapping):
        for key, value in pattern.items():
            if name == key or name.endswith(f".{key}"):
                return value
    return default


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _refused(file: Path, why: str, hint: str, where: str, kind: str = "lora") -> InputError:
    return InputError(f"{file}: {why}", hint=hint, where=where, kind=kind)
