"""The 16-bit model on disk: found, indexed from its safetensors headers, read one tensor at a time.

A source is a diffusers pipeline folder (`model_index.json`), the folder of one component (`config.json` beside its
weights), or a bare `config.json` (enough for `svdq inspect`).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdq_cli.errors import InputError

COMPONENTS = ("transformer", "unet")
_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
SIXTEEN_BIT_OR_MORE = ("F16", "BF16", "F32")
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors specification's own bound


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: BF16, F16, F32, ...

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * _DTYPE_BYTES.get(self.dtype, 0)


@dataclass(frozen=True, slots=True)
class Source:
    """A 16-bit model. `pipeline` is None for a lone component; `tensors` is empty for a bare config."""

    path: Path
    pipeline: Path | None
    component: str
    component_folder: Path | None
    config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.tensors.values())


def open_source(path: Path) -> Source:
    """Index a source without reading weights. Raises InputError naming the file and the cure."""
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return _open_pipeline(path)
        if (path / "config.json").is_file():
            return _open_component(path, pipeline=None, component=path.name)
        raise InputError(
            f"{path}: neither model_index.json nor config.json is in this folder",
            hint="give a diffusers pipeline folder (the one with model_index.json)",
            where=str(path),
        )
    if path.suffix == ".json" and path.is_file():
        config = read_json(path)
        return Source(path, None, "transformer", None, config, MappingProxyType({}))
    if path.is_file():
        raise InputError(
            f"{path}: single-file checkpoints are not supported by this version",
            hint="save the model as a diffusers pipeline folder and give that",
            where=str(path),
        )
    raise InputError(f"{path}: no such file or folder", where=str(path), kind="not-found")


def read_tensor(source: Source, name: str) -> Tensor:
    """One tensor, as stored. Raises InputError if its file is damaged or the name is missing."""
    entry = source.tensors.get(name)
    if entry is None:
        raise InputError(
            f"{source.path}: the weights have no tensor {name!r}",
            hint="the checkpoint is incomplete or of another model class; download it again",
            where=name,
        )
    try:
        with safe_open(entry.file, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{entry.file}: can't read {name}: {error}", hint="download the file again", where=str(entry.file)
        ) from error


def source_digest(source: Source) -> str:
    """sha256 over the config and every weight file's content."""
    digest = hashlib.sha256(json.dumps(dict(source.config), sort_keys=True).encode())
    for file in source.files:
        digest.update(file.name.encode())
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content (hashlib.file_digest needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not readable JSON: {error}", hint="restore the file", where=str(path)
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object", hint="restore the file", where=str(path))
    return MappingProxyType(value)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header alone, checked against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, "shorter than a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_HEADER_LIMIT, size - 8):
                raise _damaged(path, "its header is longer than the file; it is truncated or not safetensors")
            header = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"unreadable header ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    for name, facts in header.items():
        try:
            entry = TensorEntry(path, tuple(int(n) for n in facts["shape"]), str(facts["dtype"]))
            begin, end = (int(n) for n in facts["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the header entry of {name!r} is malformed") from error
        if not 0 <= begin <= end <= size - 8 - length:
            raise _damaged(path, f"{name!r} reaches beyond the end of the file; it is truncated")
        if entry.dtype in _DTYPE_BYTES and entry.bytes != end - begin:
            raise _damaged(path, f"the size of {name!r} disagrees with its shape")
        entries[name] = entry
    return entries


def _open_pipeline(path: Path) -> Source:
    index = read_json(path / "model_index.json")
    for component in COMPONENTS:
        if component in index:
            folder = path / component
            if not (folder / "config.json").is_file():
                raise InputError(
                    f"{folder}: config.json is missing",
                    hint="the download is incomplete; fetch the folder again",
                    where=str(folder),
                )
            return _open_component(folder, pipeline=path, component=component)
    raise InputError(
        f"{path}: this pipeline ({index.get('_class_name')}) has neither a transformer nor a unet",
        hint="svdq quantizes diffusion transformers and UNets",
        where=str(path),
        kind="unknown-family",
    )


def index_component(folder: Path, *, pipeline: Path | None, component: str) -> Source:
    """Index one component folder, quantized or not: its config and every tensor its headers name."""
    config = read_json(folder / "config.json")
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        entries = read_header(file)
        if twice := sorted(tensors.keys() & entries.keys()):
            raise _damaged(file, f"{twice[0]!r} is in another shard too")
        tensors.update(entries)
    return Source(folder if pipeline is None else pipeline, pipeline, component, folder, config, tensors)


def _open_component(folder: Path, *, pipeline: Path | None, component: str) -> Source:
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise InputError(
            f"{folder}: this model is already quantized ({_method(config['quantization_config'])})",
            hint="convert from the 16-bit model",
            where=str(folder),
            kind="already-quantized",
        )
    source = index_component(folder, pipeline=pipeline, component=component)
    for name, entry in source.tensors.items():
        if entry.dtype not in SIXTEEN_BIT_OR_MORE:
            raise InputError(
                f"{entry.file}: {name} is stored as {entry.dtype}",
                hint="convert from a 16-bit or 32-bit model (BF16, F16 or F32)",
                where=name,
                kind="already-quantized",
            )
    return source


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component folder: one file, or the shards its index names."""
    for stem in _WEIGHT_NAMES:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise _damaged(index, "it has no weight_map")
            files = tuple(sorted({folder / Path(str(name)).name for name in shards.values()}))
            for file in files:
                if not file.is_file():
                    raise InputError(
                        f"{file}: this shard is missing",
                        hint="download it again",
                        where=str(file),
                        kind="not-found",
                    )
            return files
        if (folder / f"{stem}.safetensors").is_file():
            return (folder / f"{stem}.safetensors",)
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise InputError(
            f"{folder}: the weights are pickles (.bin or .ckpt), which can run code when they are loaded",
            hint="save them as safetensors (save_pretrained(..., safe_serialization=True))",
            where=str(folder),
        )
    return ()


def _method(config: object) -> str:
    return (
        str(config.get("quant_method", "unknown method")) if isinstance(config, Mapping) else "unknown method"
    )


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: damaged: {why}", hint="download the file again", where=str(path), kind="damaged-file"
    )
