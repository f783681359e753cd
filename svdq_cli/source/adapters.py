"""LoRA files: whatever trainer wrote them, which layers of a model they change, and by what.

A key that finds no place is an error, never skipped. `weight_changes` has what an adapter adds to a weight,
`adapter_names` how its layers are called.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, cat

from svdq_cli.errors import InputError
from svdq_cli.source.adapter_names import (
    ModelShapes,
    find_place,
    is_for_text_encoder,
    named_by_index,
    places_of,
)
from svdq_cli.source.headers import Header, read_json, read_whole_header
from svdq_cli.source.names import Part
from svdq_cli.source.tensors import StoredTensor, is_finite
from svdq_cli.source.weight_changes import (
    DoraUpdate,
    LowRankUpdate,
    Ranges,
    WeightChange,
    as_factors,
    hadamard_update,
    kronecker_update,
)

# What stands behind a layer's name: peft, diffusers' older attention processors and their `lora_layer`s, kohya, LyCORIS
_ROLES = {
    "down": re.compile(
        r"(?:\.lora_A(?:\.\w+)?|[._]lora\d?\.down|\.lora_linear_layer\.down|\.lora_down)\.weight$"
    ),
    "up": re.compile(r"(?:\.lora_B(?:\.\w+)?|[._]lora\d?\.up|\.lora_linear_layer\.up|\.lora_up)\.weight$"),
    "bias": re.compile(r"(?:\.lora_B(?:\.\w+)?|\.lora_up)\.bias$"),
    "alpha": re.compile(r"\.(?:lora_)?alpha$"),
    "magnitude": re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)??(?:\.weight)?)$"),
    **{
        f"{algorithm}_{part}": re.compile(rf"\.{algorithm}_{part}(?:\.default)?$")
        for algorithm, parts in (
            ("hada", ("w1_a", "w1_b", "w2_a", "w2_b")),
            ("lokr", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
        )
        for part in parts
    },
}

# Adapters whose changes svdq can't compute. Each changes weights in a way of its own.
_OTHER_KINDS = {
    "OFT": re.compile(r"\.(oft_|boft_)"),
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2)\.weight$"),
    "LoCon with a middle matrix": re.compile(r"\.lora_mid\.weight$"),
    "LoHa or LoKr with a Tucker core": re.compile(r"\.(hada_t[12]|lokr_t2)$"),
    "whole weight differences": re.compile(r"\.diff(_b)?$"),
}


_VECTORS = ("alpha", "magnitude", "bias")  # of the roles; the others are matrices


@dataclass(slots=True)
class _Module:
    """One layer of an adapter file, as its keys come in."""

    name: str
    keys: dict[str, StoredTensor] = field(default_factory=dict)  # by role: down, up, alpha, ...

    def read(self, role: str) -> Tensor:
        return self.keys[role].read()

    def matrix(self, role: str) -> Tensor:
        """As a matrix: a convolution's (N, C, H, W) is (N, C * H * W)."""
        return self.read(role).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class StoredChange:
    """What an adapter file adds to one weight. Read when it is asked for: LoHa's and LoKr's factors are large."""

    module: _Module
    rows: Ranges  # of the adapter's layer
    trained: Mapping[str, object] | None

    def read(self) -> WeightChange:
        return _change(self.module, self.trained).of_rows(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLayer:
    """What one layer of an adapter file does: to which weights, and to which biases."""

    name: str  # in the file, without the ending
    kind: str
    rank: int
    weights: Mapping[str, StoredChange]  # by the model's tensor name
    biases: Mapping[str, Tensor]  # (N,) float32, at full strength


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file that fits a model, at full strength; and what it holds for other components."""

    path: Path
    layers: tuple[AdaptedLayer, ...]
    left_out: tuple[str, ...]  # keys for the text encoders

    @property
    def weights(self) -> Mapping[str, StoredChange]:
        """What is added to each weight, by the model's tensor name."""
        return {name: change for layer in self.layers for name, change in layer.weights.items()}

    @property
    def biases(self) -> Mapping[str, Tensor]:
        """What is added to each bias, by the model's tensor name."""
        return {name: added for layer in self.layers for name, added in layer.biases.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.left_out:
            return ()
        return (
            f"{self.path}: {len(self.left_out)} tensors are for the text encoders, which stay as they are",
        )


def read_adapter(path: Path, model: ModelShapes) -> Adapter:
    """The LoRA in a file, or in a folder of peft's, for `model`.

    Raises InputError: damaged, an adapter of another kind, made for another model, or with keys that have no place.
    """
    file, config = _files(path)
    header = read_whole_header(file)
    _refuse_other_kinds(file, header.tensors)
    left_out = tuple(key for key in header.tensors if is_for_text_encoder(key))
    modules = _modules(file, _model_keys(file, header, model))
    places = places_of(model)
    homeless = [module for module in modules if find_place(places, module.name) is None]
    if homeless:
        raise _no_place(file, model, modules, homeless)
    trained = config or _saved_config(header.metadata)
    layers: list[AdaptedLayer] = []
    taken: set[str] = set()
    for module in modules:
        parts = find_place(places, module.name)
        assert parts is not None
        layer = _adapted(file, module, parts, model, trained)
        if twice := taken & layer.weights.keys():
            name = min(twice)
            raise _refused(file, f"two of its layers change {name}", "the file is damaged", name)
        taken |= layer.weights.keys()
        layers.append(layer)
    return Adapter(file, tuple(layers), left_out)


# ------------------------------------------------------------------------------------------------- the file


def adapter_file(path: Path) -> Path:
    """The weight file of a LoRA: the file itself, or the one in a folder of peft's. InputError where there is none."""
    return _files(path)[0]


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
    except (ValueError, RecursionError):
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
                f"{kind}: svdq reads LoRA, DoRA, LoHa and LoKr",
                "merge it into the model with the tool that trained it, and convert the result",
                found,
            )


def _model_keys(file: Path, header: Header, model: ModelShapes) -> dict[str, StoredTensor]:
    """The tensors for the diffusion model; numbered layers under their names."""
    try:
        numbered = named_by_index(header.tensors, header.metadata, model)
    except ValueError as error:
        raise _refused(
            file,
            f"made for another model: {error}",
            "give a LoRA that was trained on this model's family",
            str(file),
            kind="lora-mismatch",
        ) from error
    return {
        numbered.get(key, key): entry for key, entry in header.tensors.items() if not is_for_text_encoder(key)
    }


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
            "svdq knows the names of peft, diffusers, kohya, LyCORIS, BFL, ComfyUI, XLabs and cloneofsimo",
            foreign[0],
        )
    halves = [module.name for module in modules.values() if _algorithm(module) is None]
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


def _no_place(file: Path, model: ModelShapes, modules: list[_Module], homeless: list[_Module]) -> InputError:
    names = _some([module.name for module in homeless])
    if len(homeless) == len(modules):
        return _refused(
            file,
            f"made for another model: none of its {len(modules)} layers is in {model.class_name}, "
            f"for example {names}",
            "give a LoRA that was trained on this model's family",
            homeless[0].name,
            kind="lora-mismatch",
        )
    return _refused(
        file,
        f"{len(homeless)} of its {len(modules)} layers are not in {model.class_name}: {names}",
        "the LoRA was trained on a variant of the model; svdq takes all of it or nothing",
        homeless[0].name,
        kind="lora-mismatch",
    )


# ------------------------------------------------------------------------------------------------- the numbers


def _adapted(
    file: Path,
    module: _Module,
    parts: tuple[Part, ...],
    model: ModelShapes,
    trained: Mapping[str, object] | None,
) -> AdaptedLayer:
    """What a module does to each tensor that it changes. Raises InputError where sizes disagree or a value is NaN."""
    _require_numbers(file, module)
    try:
        change = _change(module, trained)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # torch's words for matrices that do not fit, ours for an odd alpha
        raise _refused(
            file,
            f"{module.name}: its factors do not fit each other: {str(error).splitlines()[0]}",
            "the file is damaged; download it again",
            module.name,
        ) from error
    bias = module.read("bias").float() * _low_rank(change).scale if "bias" in module.keys else None
    _require_sizes(file, module, change, bias)
    weights: dict[str, StoredChange] = {}
    biases: dict[str, Tensor] = {}
    for part, ranges in _rows(file, module, parts, change, model):
        weights[f"{part.target}.weight"] = StoredChange(module, ranges, trained)
        if bias is not None:
            biases[f"{part.target}.bias"] = cat([bias[start:stop] for start, stop in ranges])
    return AdaptedLayer(module.name, change.kind, change.rank, weights, biases)


def _algorithm(module: _Module) -> Callable[[_Module, Mapping[str, object] | None], LowRankUpdate] | None:
    """How a module's factors are read; None where some of them are missing."""
    roles = module.keys.keys()
    if {"down", "up"} <= roles:
        return _lora
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= roles:
        return _loha
    if all(f"lokr_{w}" in roles or {f"lokr_{w}_a", f"lokr_{w}_b"} <= roles for w in ("w1", "w2")):
        return _lokr
    return None


def _change(module: _Module, trained: Mapping[str, object] | None) -> WeightChange:
    algorithm = _algorithm(module)
    assert algorithm is not None
    update = algorithm(module, trained)
    return DoraUpdate(update, module.read("magnitude").flatten()) if "magnitude" in module.keys else update


def _low_rank(change: WeightChange) -> LowRankUpdate:
    return change.direction if isinstance(change, DoraUpdate) else change


def _lora(module: _Module, trained: Mapping[str, object] | None) -> LowRankUpdate:
    down, up = module.matrix("down"), module.matrix("up")
    return LowRankUpdate(down, up, _scale(module, down.shape[0], trained))


def _loha(module: _Module, trained: Mapping[str, object] | None) -> LowRankUpdate:
    rank = module.keys["hada_w1_b"].shape[0]
    first, second = ((module.matrix(f"hada_{w}_a"), module.matrix(f"hada_{w}_b")) for w in ("w1", "w2"))
    return hadamard_update(first, second, scale=_scale(module, rank, trained))


def _lokr(module: _Module, trained: Mapping[str, object] | None) -> LowRankUpdate:
    """Where neither factor is a product of low rank, LyCORIS ignores alpha."""
    rank = next((module.keys[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in module.keys), None)
    factors = [
        (module.matrix(f"lokr_{w}_a"), module.matrix(f"lokr_{w}_b"))
        if f"lokr_{w}" not in module.keys
        else as_factors(module.matrix(f"lokr_{w}"))
        for w in ("w1", "w2")
    ]
    scale = 1.0 if rank is None else _scale(module, rank, trained)
    return kronecker_update(factors[0], factors[1], scale=scale)


def _scale(module: _Module, rank: int, trained: Mapping[str, object] | None) -> float:
    """alpha / rank; an adapter that says no alpha is scaled by 1, as its trainers do."""
    if "alpha" in module.keys:
        return _finite(module.read("alpha").float().reshape(()).item()) / rank
    if trained is None:
        return 1.0
    alpha = _of_module(trained.get("alpha_pattern"), module.name, trained.get("lora_alpha", rank))
    return _finite(alpha) / (rank**0.5 if trained.get("use_rslora") else rank)


def _finite(alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r}, not a number")
    return float(alpha)


def _of_module(pattern: object, name: str, default: object) -> object:
    """peft's per-layer values: the first whose key ends the layer's name."""
    if isinstance(pattern, Mapping):
        for key, value in pattern.items():
            if name == key or name.endswith(f".{key}"):
                return value
    return default


# ------------------------------------------------------------------------------------------------- refusals


def _require_numbers(file: Path, module: _Module) -> None:
    for role, entry in module.keys.items():
        if 0 in entry.shape:
            raise _refused(
                file,
                f"{module.name}: {entry.origin} is empty, of shape {list(entry.shape)}: a LoRA of rank 0",
                "the file is damaged; download it again",
                module.name,
            )
        if role not in _VECTORS and len(entry.shape) < 2:
            raise _refused(
                file,
                f"{module.name}: {entry.origin} has shape {list(entry.shape)}, and a factor is a matrix",
                "the file is damaged; download it again",
                module.name,
            )
        if not is_finite(module.read(role)):
            raise _refused(
                file,
                f"{module.name} holds NaN or infinite values",
                "use another LoRA",
                module.name,
                "not-finite",
            )


def _require_sizes(file: Path, module: _Module, change: WeightChange, bias: Tensor | None) -> None:
    """The vectors of an adapter have a number for each of its rows."""
    rows = _low_rank(change).up.shape[0]
    if isinstance(change, DoraUpdate) and change.magnitude.numel() != rows:
        raise _refused(
            file,
            f"{module.name}: DoRA with {change.magnitude.numel()} lengths for {rows} rows; svdq reads lengths of rows, "
            "not of columns",
            "merge it into the model with the tool that trained it, and convert the result",
            module.name,
        )
    if bias is not None and bias.shape != (rows,):
        raise _refused(
            file,
            f"{module.name}: its bias has shape {list(bias.shape)} instead of [{rows}]",
            "the file is damaged; download it again",
            module.name,
        )


def _rows(
    file: Path, module: _Module, parts: tuple[Part, ...], change: WeightChange, model: ModelShapes
) -> Iterator[tuple[Part, list[tuple[int, int]]]]:
    """The rows of the module that each layer consists of. Raises InputError where the sizes are not the model's."""
    update = _low_rank(change)
    for part in parts:
        name = f"{part.target}.weight"
        shape = model.shapes[name]
        try:
            ranges = [rows.among(update.up.shape[0]) for rows in part.rows]
        except ValueError:
            ranges = []
        rows = sum(stop - start for start, stop in ranges)
        fits = rows == shape[0] and update.down.shape[1] == math.prod(shape[1:])
        if update.up.shape[1] != update.rank or not fits:
            raise _refused(
                file,
                f"{module.name} has matrices {list(update.up.shape)} and {list(update.down.shape)}, {name} has shape "
                f"{list(shape)}",
                "the LoRA was trained on another variant of the model",
                module.name,
                kind="lora-mismatch",
            )
        yield part, ranges


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _refused(file: Path, why: str, hint: str, where: str, kind: str = "lora") -> InputError:
    return InputError(f"{file}: {why}", hint=hint, where=where, kind=kind)
