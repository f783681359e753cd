"""The metadata of a single safetensors file: text in its header, JSON where it is more than a word."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.formats.json_keys import json_object

CONFIG = "config"  # the diffusers config of the model, by which any of these files is opened again
RANKS = "svdq_ranks"  # {layer: rank}: a stored module's rank may be the sum of several, or shared by parts of a layer
BIASES = "svdq_biases"  # {layer: base64}: what `assembly.moved_biases` keeps
SCHEDULER = "svdq_scheduler"  # settings that the model needs of its pipeline's scheduler
FORMAT = "svdq_format"  # the name of the format
COMPONENT = "svdq_component"  # the pipeline's component, where its name is none of the usual two


def as_text(values: Mapping[str, object]) -> dict[str, str]:
    """Header values are text: words as they are, everything else as JSON."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in values.items()
    }


def json_value(metadata: Mapping[str, str], key: str) -> Mapping[str, object] | None:
    """The JSON object under `key`, None where the key is missing. InputError for anything else."""
    if key not in metadata:
        return None
    try:
        value = json_object(json.loads(metadata[key]))
    except (ValueError, RecursionError):
        value = None
    if value is None:
        raise InputError(f"header: {key} is not a JSON object", where=key, hint="the file is damaged")
    return value


def ranks_of(metadata: Mapping[str, str]) -> dict[str, int]:
    """The layers' own ranks, empty where the header says none."""
    found = json_value(metadata, RANKS) or {}
    return {name: rank for name, rank in found.items() if isinstance(rank, int)}


def biases_text(biases: Mapping[str, Tensor]) -> dict[str, str]:
    """16-bit biases as base64 of their little-endian words."""
    return {
        name: base64.b64encode(bias.contiguous().view(torch.uint8).numpy().tobytes()).decode("ascii")
        for name, bias in sorted(biases.items())
    }


def biases_of(metadata: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of `biases_text`. InputError for what is not base64 of 16-bit words."""
    found: dict[str, Tensor] = {}
    for name, text in (json_value(metadata, BIASES) or {}).items():
        try:
            raw = bytearray(base64.b64decode(cast("str", text), validate=True))
            found[name] = torch.frombuffer(raw, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"header: {BIASES} of {name} is not base64 of 16-bit numbers",
                where=name,
                hint="the file is damaged",
            ) from error
    return found
