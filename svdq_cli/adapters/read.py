"""LoRA files: whatever trainer wrote them, which layers of a model they change, and by what.

A key that finds no place is an error, never skipped. `adapters.keys` sorts the keys, `adapters.names` knows how layers
are called, `adapters.configs` what the trainer said next to the file, `adapters.fitting` puts the layers into the
model, `adapters.changes` reads their numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from svdq_cli.adapters.changes import StoredChange, lokr_rank
from svdq_cli.adapters.configs import (
    WEIGHT_FILE,
    TrainingConfig,
    alpha_of_all_layers,
    config_beside,
    config_in_header,
)
from svdq_cli.adapters.fitting import AdaptedLayer, fitted_layers
from svdq_cli.adapters.keys import AdapterModule, modules_of, refuse_other_kinds, refused, require_whole, some
from svdq_cli.adapters.names import (
    ModelShapes,
    Places,
    find_place,
    named_by_index,
    part_of,
    places_of,
)
from svdq_cli.errors import InputError
from svdq_cli.source.headers import Header, is_gguf, read_whole_header
from svdq_cli.source.original_names import naming_of
from svdq_cli.source.tensors import StoredTensor
from svdq_cli.text import counted

_NAMED_DEFAULT = re.compile(r"\.lora_[AB]\.default\.weight$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
# Where a model reads its image; what was trained on more channels (control, inpainting) is wider here, and only here
_INPUTS = (
    "x_embedder",
    "conv_in",
    "pos_embed.proj",
    "patch_embed.proj",
    "patch_embedding",
    "img_in",
    "proj_in",
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file that fits a model, at full strength; and what it holds for other components."""

    path: Path
    layers: tuple[AdaptedLayer, ...]
    left_out: tuple[str, ...]  # keys for the text encoders, and for what is between them and the denoiser
    component: str | None = None  # the denoiser that it is for; None where there is one, or its names say
    changed_base: str | None = None  # PiSSA, OLoRA: what its training took out of the model first
    notes: tuple[str, ...] = field(default=())

    @property
    def weights(self) -> Mapping[str, StoredChange]:
        """What is added to each weight, by the model's tensor name."""
        return {name: change for layer in self.layers for name, change in layer.weights.items()}

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """What is added to each bias and norm, by the model's tensor name."""
        return {name: added for layer in self.layers for name, added in layer.vectors.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.left_out:
            return self.notes
        whose = sorted({str(part_of(key)) for key in self.left_out}, reverse=True)
        return (
            f"{self.path}: left out {counted(len(self.left_out), 'tensor')} for the {' and '.join(whose)}",
            *self.notes,
        )


def read_adapter(path: Path, model: ModelShapes, component: str | None = None) -> Adapter:
    """The LoRA in a file, or in a folder of peft's, for `model`; for one of its denoisers where `component` names it.

    Raises InputError: damaged, an adapter of another kind, made for another model, or with keys that have no place.
    """
    file = adapter_file(path)
    if is_gguf(file):
        raise refused(file, "a GGUF file, not safetensors", "give the LoRA as it was trained", str(file))
    header = read_whole_header(file)
    trained = _training_config(file, header, model)
    if trained is not None:
        trained.require_readable()
    keys = _model_keys(file, header, model)
    refuse_other_kinds(file, keys)
    modules, foreign = modules_of(file, keys)
    # DiffSynth-Studio's files are told by peft's name for an adapter
    places = places_of(model, component, by_heads=any(_NAMED_DEFAULT.search(key) for key in keys))
    _refuse_other_parts_alone(file, header, keys)
    _refuse_wider(file, modules, places, model)
    require_whole(file, modules, foreign)
    _refuse_rank_stabilized_lokr(file, modules, header.metadata)
    layers = fitted_layers(file, modules, places, model, trained)
    return Adapter(
        path=file,
        layers=layers,
        left_out=tuple(key for key in header.tensors if part_of(key) is not None),
        component=component,
        changed_base=None if trained is None else trained.changed_base,
        notes=_notes(file, modules, layers, trained),
    )


# ------------------------------------------------------------------------------------------------- the file


def adapter_file(path: Path) -> Path:
    """The weight file of a LoRA: the file itself, or the one in a folder of peft's. InputError where there is none."""
    if path.is_dir():
        file = path / WEIGHT_FILE
        if not file.is_file():
            raise InputError(
                f"{path}: no {WEIGHT_FILE} in this folder",
                hint="give the LoRA's .safetensors file itself",
                where=str(path),
                kind="not-found",
            )
        return file
    if not path.is_file():
        on_hub = _HUB_ID.fullmatch(str(path)) and path.suffix not in _SUFFIXES
        raise InputError(
            f"{path}: no such LoRA file",
            hint=f"for the LoRA on the Hub: hf download {path} --local-dir DIR, then --lora DIR/FILE.safetensors"
            if on_hub
            else "write --lora FILE or --lora FILE:WEIGHT",
            where=str(path),
            kind="not-found",
        )
    return path


def _model_keys(file: Path, header: Header, model: ModelShapes) -> dict[str, StoredTensor]:
    """The tensors for the diffusion model; numbered layers under their names."""
    try:
        numbered = named_by_index(header.tensors, header.metadata, model)
    except ValueError as error:
        raise refused(
            file,
            f"made for a different model: {error}",
            "give a LoRA that was trained on this model's family",
            str(file),
            kind="lora-mismatch",
        ) from error
    return {numbered.get(key, key): entry for key, entry in header.tensors.items() if part_of(key) is None}


def _training_config(file: Path, header: Header, model: ModelShapes) -> TrainingConfig | None:
    """What the trainer said of the adapter, in the header or next to the file."""
    found = config_in_header(file, header.metadata) or config_beside(
        file, named_by_peft=any(key.startswith("base_model.model.") for key in header.tensors)
    )
    naming = naming_of(model.class_name)
    if found is not None or naming is None or not naming.alpha_in_header:
        return found
    return alpha_of_all_layers(file, header.metadata)


def _refuse_other_parts_alone(file: Path, header: Header, keys: Mapping[str, StoredTensor]) -> None:
    """A LoRA that changes text encoders alone, of which svdq would use nothing."""
    if keys or not header.tensors:
        return
    parts = sorted({str(part_of(key)) for key in header.tensors}, reverse=True)
    raise refused(
        file,
        f"a LoRA for the {' and '.join(parts)} alone: svdq changes the diffusion model, and leaves those as they are",
        "run it with diffusers: load_lora_weights on the pipeline's own text encoders",
        next(iter(header.tensors)),
    )


def _refuse_wider(file: Path, modules: Sequence[AdapterModule], places: Places, model: ModelShapes) -> None:
    """A LoRA of a model that reads more channels than this one: FLUX.1 Control or Fill, an inpainting UNet."""
    for module in modules:
        parts, down = find_place(places, module.name), module.keys.get("down")
        if down is None or parts is None or not parts[0].target.startswith(_INPUTS):
            continue
        target, columns = parts[0].target, math.prod(down.shape[1:])
        known = math.prod(model.shapes[f"{target}.weight"][1:])
        if columns > known:
            raise refused(
                file,
                f"control LoRA, which widens an input: {module.name} reads {columns} values, but {target} of this "
                f"model reads {known}",
                "a LoRA can't give a model more inputs: convert the model that it was trained on (a control, fill or "
                "inpainting model), with the LoRA merged there",
                module.name,
                kind="lora-mismatch",
            )


def _refuse_rank_stabilized_lokr(
    file: Path, modules: Sequence[AdapterModule], metadata: Mapping[str, str]
) -> None:
    """LyCORIS scales LoKr of whole matrices by 1, but trains it by the root of its rank with rs_lora, and then saves
    that rank to the power of 3/2 as its alpha: no reader knows of it, LyCORIS itself included."""
    said = _json_object(metadata.get("ss_network_args", "")).get("rs_lora")
    for module in modules:
        if module.algorithm != "LoKr" or "alpha" not in module.keys or lokr_rank(module) is not None:
            continue
        alpha = module.read("alpha").double().flatten()
        rank = float(alpha[0].abs()) ** (2 / 3) if alpha.numel() == 1 else 0.0
        if str(said).lower() == "true" or (
            float(alpha[0]) % 1 != 0 and rank > 1.5 and abs(rank - round(rank)) < 2**-8 * rank
        ):
            raise refused(
                file,
                f"{module.name}: LoKr of whole matrices that was trained with rs_lora, which LyCORIS scales "
                "differently "
                "in training and on loading",
                "merge it into the model with the tool that trained it, and convert the result",
                module.name,
            )


def _json_object(text: str) -> Mapping[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _notes(
    file: Path,
    modules: Sequence[AdapterModule],
    layers: Sequence[AdaptedLayer],
    trained: TrainingConfig | None,
) -> tuple[str, ...]:
    """What a user should know of a file that can be merged."""
    found: list[str] = []
    untold = [module for module in modules if module.is_peft_s and "alpha" not in module.keys]
    if untold and trained is None:
        found.append(
            f"{file}: neither the file nor an adapter_config.json next to it gives alpha, so it is taken as the rank "
            "(a scale of 1); give the whole peft folder, or --lora FILE:WEIGHT with a weight of alpha / rank"
        )
    idle = [layer for layer in layers if not layer.changes]
    if idle:
        which = (
            "it changes nothing"
            if len(idle) == len(layers)
            else f"{len(idle)} of {len(layers)} layers change nothing"
        )
        found.append(
            f"{file}: {which}: alpha is 0, or a matrix is all zeros ({some([i.name for i in idle])})"
        )
    if trained is not None and trained.changed_base is not None:
        found.append(
            f"{file}: {trained.changed_base}: its training subtracted a part from every weight it adapts, and so does "
            "svdq, as peft does on loading"
        )
    return tuple(found)
