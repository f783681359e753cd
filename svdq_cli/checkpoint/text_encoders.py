"""What becomes of every layer of a pipeline's text encoder, from its config and the headers of its weights.

In 4 bits: the linear layers of the blocks that read text, and a language model's head where it has weights of its own.
At 16 bits: token embeddings (a lookup, which no library reads in 4 bits), norms, towers that see images, layers outside
the blocks, layers that the model's class asks to be kept (T5's `wo`), and those whose width is not a multiple of 64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdq_cli.checkpoint.nf4_layers import stored_specs
from svdq_cli.errors import EnvironmentLacksError, InputError, first_line
from svdq_cli.solve.nf4 import GROUP
from svdq_cli.source import TensorEntry, pipeline_index, read_header, text_encoders_of, weight_files
from svdq_cli.source.quantized import already_quantized, refuse_quantized
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import is_pipeline
from svdq_cli.storage.tensor_file import DTYPE_OF_NAME, TensorSpec
from svdq_cli.system.quiet import quiet_loading

_FLOATS = ("F16", "BF16", "F32")
_KEPT_AS_STORED = ("I64", "I32", "BOOL")  # tables of positions, which no version reads any more
_BLOCK = re.compile(r"^(?:\w+\.)*?\w+\.\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """A linear layer in 4 bits. `block`: the path of the block that it is in, None for the head."""

    name: str  # path of the module
    tensor: str  # the weight's name in the file
    in_features: int
    out_features: int
    block: str | None


@dataclass(frozen=True)
class EncoderPlan:
    """A text encoder before a weight is read."""

    component: str
    folder: Path
    class_name: str
    dtype: torch.dtype  # of everything that is stored in 16 bits
    tensors: Mapping[str, TensorEntry]  # by their names in the file
    parameters: Mapping[str, str]  # name in the file -> the model's own name
    layers: tuple[EncoderLayer, ...]
    kept: Mapping[str, str]  # linear layers at 16 bits -> why

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor of the 4-bit file."""
        packed = {layer.tensor: layer for layer in self.layers}
        found: dict[str, TensorSpec] = {}
        for name, entry in self.tensors.items():
            if layer := packed.get(name):
                found |= stored_specs(name, layer.out_features, layer.in_features)
            else:
                found[name] = TensorSpec(entry.shape, self.stored_dtype(entry))
        return found

    def stored_dtype(self, entry: TensorEntry) -> torch.dtype:
        """The dtype of a tensor that is not in 4 bits."""
        return self.dtype if entry.dtype in _FLOATS else DTYPE_OF_NAME[entry.dtype]

    @property
    def bytes_before(self) -> int:
        """All tensors at 16 bits, whatever the file stores."""
        return 2 * sum(torch.Size(entry.shape).numel() for entry in self.tensors.values())

    @property
    def bytes_after(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks with 4-bit layers, in the order in which they run."""
        return tuple(dict.fromkeys(layer.block for layer in self.layers if layer.block is not None))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files with the weights."""
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    def empty_model(self) -> nn.Module:
        """The model without memory for its parameters; its buffers are there."""
        return empty_encoder(self.folder, self.class_name)


def plan_encoders(
    pipeline: Path | None,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    replaced: Mapping[str, Mapping[str, TensorEntry]],
) -> tuple[EncoderPlan, ...]:
    """The plans of a pipeline's text encoders `names`. `replaced`: weights that take the place of the folder's, by
    component. Raises InputError for what is no text encoder, and for one that can't be read."""
    return tuple(
        plan_encoder(_folder_of(pipeline, name), name, dtype=dtype, tensors=replaced.get(name))
        for name in names
    )


def _folder_of(pipeline: Path | None, name: str) -> Path:
    index = pipeline_index(pipeline) if pipeline else {}
    folder = pipeline / name if pipeline and name in index else None
    known = text_encoders_of(pipeline) if pipeline else ()
    if folder is None or name not in known or not (folder / "config.json").is_file():
        others = ", ".join(known)
        what = f"{name} is no text encoder of transformers" if name in index else f"there is no {name!r}"
        raise InputError(
            f"components: {what}" + (f" in {pipeline}" if pipeline else ": this is not a pipeline"),
            hint=f"name a text encoder of the pipeline: {others}"
            if others
            else "give a whole pipeline folder",
            where=name,
        )
    return folder


def plan_encoder(
    folder: Path, component: str, *, dtype: torch.dtype, tensors: Mapping[str, TensorEntry] | None = None
) -> EncoderPlan:
    """The plan of the text encoder in `folder`, a component of a pipeline. `tensors` replace those in the folder."""
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise already_quantized(
            folder, str(_method(config)), where=component, hint=f"drop {component} from components"
        )
    class_name = _class_of(folder, component, config)
    if tensors is None:
        stored = {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}
        refuse_quantized(folder, stored)
        tensors = stored
    if not tensors:
        raise InputError(
            f"{folder}: the weights are missing", hint="download the folder again", where=str(folder)
        )
    for name, entry in tensors.items():
        if entry.dtype not in (*_FLOATS, *_KEPT_AS_STORED):
            raise InputError(
                f"{entry.file}: {name} is stored as {entry.dtype}, not in 16 or 32 bits",
                hint=f"use the 16-bit {component}, or drop it from components",
                where=name,
            )
    model = empty_encoder(folder, class_name)
    parameters = _own_names(model, tensors)
    layers, kept = _roles(model, {own: name for name, own in parameters.items()}, tensors)
    if not any(layer.block for layer in layers):
        raise InputError(
            f"{folder}: svdq finds no layers in this {class_name} to quantize",
            hint=f"drop {component} from components",
            where=component,
        )
    return EncoderPlan(component, folder, class_name, dtype, tensors, parameters, tuple(layers), kept)


def _method(config: Mapping[str, object]) -> object:
    found = config.get("quantization_config")
    return found.get("quant_method", "unknown method") if isinstance(found, Mapping) else "unknown method"


def _class_of(folder: Path, component: str, config: Mapping[str, object]) -> str:
    """The class that diffusers loads: the pipeline's index names it."""
    entry = pipeline_index(folder.parent).get(component) if is_pipeline(folder.parent) else None
    if (
        isinstance(entry, list)
        and len(entry) == 2
        and entry[0] == "transformers"
        and isinstance(entry[1], str)
    ):
        name = entry[1]
    else:
        architectures = config.get("architectures")
        name = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    import transformers

    found = getattr(transformers, name, None) if re.fullmatch(r"\w+", name) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(
            f"components: {component} is a {name}, which is no model of transformers",
            hint=f"drop {component} from components, or upgrade transformers",
            where=str(folder),
        )
    return name


def empty_encoder(folder: Path, class_name: str) -> nn.Module:
    """A model of transformers without memory for its parameters. Raises InputError for a config that it refuses."""
    import transformers
    from accelerate import init_empty_weights

    model_class: Any = getattr(transformers, class_name)
    try:
        with quiet_loading():
            config = model_class.config_class.from_pretrained(str(folder), local_files_only=True)
            with init_empty_weights(include_buffers=False):
                model = model_class(config)
    except Exception as error:  # whatever a config of someone else makes a class raise
        raise InputError(
            f"{folder}: transformers can't build this {class_name}: {first_line(error)}",
            hint="download the folder again, and check that this version of transformers knows the model",
            where=str(folder),
        ) from error
    return model.eval().requires_grad_(False)


def _own_names(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """The model's own names of stored tensors: transformers renames some of them when it loads. Without those that it
    merges with others."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as error:
        raise EnvironmentLacksError(
            "4-bit text encoders need transformers 5",
            hint='pip install "svdq[encoders]"',
            where="transformers",
        ) from error
    transforms = get_model_conversion_mapping(model)
    renamings: Any = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters: Any = [each for each in transforms if isinstance(each, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    for name in tensors:
        own, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if merged is None:
            found[name] = own
    return found


def _roles(
    model: Any, stored: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> tuple[list[EncoderLayer], dict[str, str]]:
    """(layers in 4 bits, linear layers at 16 bits with the reason). `stored`: own name -> name in the file."""
    towers = tuple(f"{path}." for path in _other_towers(model))
    protected = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    head = model.get_output_embeddings()
    layers: list[EncoderLayer] = []
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        name = stored.get(f"{path}.weight")
        block = _block_of(path)
        if name is None:
            kept[path] = "has no weights of its own"
        elif path.startswith(towers):
            kept[path] = "does not read text"
        elif any(path == word or path.endswith(f".{word}") for word in protected):
            kept[path] = f"transformers keeps {path.rpartition('.')[2]} at 16 bits"
        elif type(module) is not nn.Linear:
            kept[path] = f"is a {type(module).__name__}"
        elif block is None and module is not head:
            kept[path] = "is outside the blocks"
        elif module.in_features % GROUP:
            kept[path] = f"its width, {module.in_features}, is not a multiple of {GROUP}"
        elif tensors[name].shape != (module.out_features, module.in_features):
            raise InputError(
                f"{tensors[name].file}: {name} is {tuple(tensors[name].shape)}, but the config describes "
                f"{(module.out_features, module.in_features)}",
                hint="download the folder again",
                where=name,
                kind="shape-mismatch",
            )
        else:
            layers.append(EncoderLayer(path, name, module.in_features, module.out_features, block))
    return layers, kept


def _other_towers(model: Any) -> Iterable[str]:
    """Paths of models inside the model that have a config of their own for something else than text: vision, audio."""
    text = (type(model.config), type(model.config.get_text_config()))
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and type(module.config) not in text:
            yield path


def _block_of(path: str) -> str | None:
    """The block that a module is in: encoder.block.0 of encoder.block.0.layer.1.DenseReluDense.wi_0."""
    found = _BLOCK.match(path)
    return found[0] if found else None
