"""Is a stored 4-bit text encoder what its plan announces: structure, finite numbers, and the weights it represents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from svdq_cli.checkpoint.nf4_layers import LAYER_TENSORS, StoredWeight, packed_weights, stored_weight
from svdq_cli.checkpoint.text_encoders import plan_encoder
from svdq_cli.errors import InputError
from svdq_cli.reports import ByteFacts, CheckProblem, TextEncoderFacts
from svdq_cli.source import TensorEntry, is_finite, pipeline_index, read_header, weight_files
from svdq_cli.source.tensors import StoredTensor, entry_bytes
from svdq_cli.storage.json_files import read_json

# As of other layers (see checkpoint/check.py): a search leaves 0.98 and more, numbers in a wrong order have 0.
LEAST_AGREEMENT = 0.6
_METHOD = "bitsandbytes"
_NUMBERS_AT_ONCE = 1 << 22


def four_bit_encoders(pipeline: Path) -> tuple[str, ...]:
    """The components of a pipeline folder that svdq stored as 4-bit text encoders."""
    return tuple(
        name
        for name, value in pipeline_index(pipeline).items()
        if isinstance(value, list) and value[:1] == ["transformers"] and _method(pipeline / name) == _METHOD
    )


def _method(folder: Path) -> object:
    file = folder / "config.json"
    section = read_json(file).get("quantization_config") if file.is_file() else None
    return section.get("quant_method") if isinstance(section, Mapping) else None


def stored_facts(pipeline: Path, component: str) -> TextEncoderFacts:
    """What the headers of a 4-bit text encoder say of it."""
    entries, folder = _entries(pipeline / component), pipeline / component
    packed = packed_weights(entries)
    after = sum(map(entry_bytes, entries.values()))
    kept = sum(math.prod(entry.shape) for entry in _kept(entries, packed).values())
    before = 2 * (kept + sum(2 * entries[name].shape[0] for name in packed))
    section = read_json(folder / "config.json").get("quantization_config")
    skipped = section.get("llm_int8_skip_modules") if isinstance(section, Mapping) else None
    index = pipeline_index(pipeline)[component]
    class_name = str(index[1]) if isinstance(index, list) else ""
    names = {str(name): "at 16 bits" for name in skipped} if isinstance(skipped, list) else {}
    return TextEncoderFacts(class_name, ByteFacts(before, after, before / after), len(packed), names)


def _entries(folder: Path) -> dict[str, StoredTensor]:
    return {name: entry for file in weight_files(folder) for name, entry in read_header(file).items()}


def _kept(entries: Mapping[str, StoredTensor], packed: Iterable[str]) -> dict[str, StoredTensor]:
    """What is stored in 16 bits."""
    own = {key for name in packed for key in (name, *(f"{name}.{part}" for part in LAYER_TENSORS))}
    return {name: entry for name, entry in entries.items() if name not in own}


def encoder_problems(pipeline: Path, component: str, against: Path | None) -> Iterator[CheckProblem]:
    """What is wrong with a 4-bit text encoder. `against`: the pipeline folder that it was made from."""
    folder = pipeline / component
    entries = _entries(folder)
    packed = packed_weights(entries)
    source: Mapping[str, TensorEntry] = {}
    if against is not None and against.resolve() != pipeline.resolve():
        try:
            plan = plan_encoder(against / component, component, dtype=torch.bfloat16)
        except InputError:  # another component's folder, or a quantized one: there is nothing to compare with
            plan = None
        source = plan.tensors if plan else {}
        missing = [name for name in source if name not in entries]
        yield from (CheckProblem(f"{component}: {name}", "is missing") for name in missing)
    for name in packed:
        if what := _wrong(name, entries, source.get(name)):
            yield CheckProblem(f"{component}: {name}", what)
    for name, entry in _kept(entries, packed).items():
        if not is_finite(entry.read()):
            yield CheckProblem(f"{component}: {name}", "holds NaN or infinite values")


def _wrong(name: str, entries: Mapping[str, TensorEntry], source: TensorEntry | None) -> str | None:
    lacking = [part for part in LAYER_TENSORS if f"{name}.{part}" not in entries]
    if lacking:
        return f"{lacking[0]} is missing"
    tensors = {key: entries[key].read() for key in (name, *(f"{name}.{part}" for part in LAYER_TENSORS))}
    try:
        weight = stored_weight(name, tensors)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, OverflowError) as error:
        return f"can't be decoded: {error}"
    if not is_finite(weight.scales):
        return "holds NaN or infinite values"
    if source is None:
        return None
    if weight.shape != source.shape:
        return f"has shape {list(weight.shape)} instead of {list(source.shape)}"
    return None if _agreement(weight, source) >= LEAST_AGREEMENT else "its weight does not match the source's"


def _agreement(weight: StoredWeight, source: TensorEntry) -> float:
    """The cosine of two weights, 1 for two of zeros."""
    products = own = other = 0.0
    step = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        first, second = weight.rows(slice(start, start + step)), source.read_rows(start, start + step).float()
        products += float((first * second).sum())
        own += float(first.square().sum())
        other += float(second.square().sum())
    size = math.sqrt(own * other)
    return products / size if size else 1.0
