"""Original names that diffusers knows how to convert, for every class that svdq has no table for.

diffusers' own conversion is run on stand-ins of the file's tensors (`traced`), which tells where each row goes; the
weights are read later, one at a time, as with svdq's own tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from svdq_cli.source.companions import TurnedTensor
from svdq_cli.source.tensors import Rows, RowsTensor, TensorEntry
from svdq_cli.source.traced import Traced, fit_splits, stand_ins
from svdq_cli.system.allocator import unwatched_garbage

_PREFIXES = ("", "net.")  # a conversion may tell the file by a prefix that has been taken off
# diffusers looks for LTX-Video's names first, which LTX-2 has too
_LTX2 = "av_ca_a2v_gate_adaln_single."
_NO_DENOISERS = ("controlnet", "animatediff", "autoencoder", "z-image-turbo-controlnet")


def convert_by_library(
    model_class: str,
    config: Mapping[str, object],
    stored: Mapping[str, TensorEntry],
    wanted: Mapping[str, tuple[int, ...]],
) -> dict[str, TensorEntry]:
    """What diffusers' single-file loader for the class makes of a checkpoint, under diffusers' names.

    `wanted`: names and shapes of the model's tensors. Empty where diffusers converts no single files of this class or
    fails on this one; whether what it made is the whole model is for the caller to see.
    """
    convert = _conversion(model_class)
    best: dict[str, TensorEntry] = {}
    for prefix in _PREFIXES if convert else ():
        assert convert is not None
        entries = {prefix + key: entry for key, entry in stored.items()}
        traced = stand_ins({key: entry.shape for key, entry in entries.items()})
        try:
            converted = convert(checkpoint=traced, config=dict(config))
        except (
            Exception
        ):  # what a conversion raises at names or shapes that it was not written for is of every kind
            continue
        results = {name: value for name, value in converted.items() if isinstance(value, Traced)}
        fit_splits(results, wanted)
        found = {name: _entry(value, entries) for name, value in results.items() if value.rows}
        if len(found.keys() & wanted.keys()) > len(best.keys() & wanted.keys()):
            best = found
    return best


def published_pipeline(stored: Mapping[str, TensorEntry]) -> str | None:
    """The Hub id of the pipeline that diffusers takes such a file for; None where it knows none."""
    with unwatched_garbage():
        from diffusers.loaders import single_file_utils
    infer = getattr(single_file_utils, "infer_diffusers_model_type", None)
    pipelines = getattr(single_file_utils, "DIFFUSERS_DEFAULT_PIPELINE_PATHS", {})
    if infer is None:
        return None
    try:
        model_type = "ltx2-dev" if any(_LTX2 in key for key in stored) else str(infer(stored))
    except Exception:  # it reads shapes that it takes for granted
        return None
    if model_type == "v1" or model_type.startswith(_NO_DENOISERS):  # "v1": nothing that it knows
        return None
    return pipelines.get(model_type, {}).get("pretrained_model_name_or_path")


def _conversion(model_class: str) -> Callable[..., Mapping[str, Any]] | None:
    with unwatched_garbage():
        from diffusers.loaders import single_file_model
    known = getattr(single_file_model, "SINGLE_FILE_LOADABLE_CLASSES", {})
    return known.get(model_class, {}).get("checkpoint_mapping_fn")


def _entry(value: Traced, stored: Mapping[str, TensorEntry]) -> TensorEntry:
    assert value.rows is not None
    parts = tuple(Rows(stored[rows.key], rows.start, rows.stop) for rows in value.rows)
    whole = parts[0].entry
    alone = len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, whole.shape[0] if whole.shape else 1)
    entry = whole if alone else RowsTensor(parts)
    return TurnedTensor(entry, value.shape, transposed=False) if value.reshaped else entry
