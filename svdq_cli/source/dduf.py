"""DDUF: a whole diffusers pipeline in one file, a ZIP archive whose entries are stored as they are.

The denoiser's weights are read where they are stored. The other components are not unpacked: a base has them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdq_cli.errors import InputError
from svdq_cli.source.denoisers import joined
from svdq_cli.source.folders import component_config, denoiser_order, is_denoiser, whole_set
from svdq_cli.source.headers import read_whole_header
from svdq_cli.source.model import Source
from svdq_cli.source.quantized import refuse_quantized_config
from svdq_cli.source.tensors import StoredTensor
from svdq_cli.source.upconverted import upconverted
from svdq_cli.storage.headers import damaged

SUFFIX = ".dduf"
_JSON_LIMIT = 1 << 24  # bytes of a component's config
_WHOLE = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def open_dduf(path: Path, *, base: Path | None = None) -> Source:
    """Index a DDUF file: its transformer or UNet, or all of them. `base`: a folder of the same pipeline.

    Raises InputError: damaged, already quantized, or not the base's model.
    """
    entries = _entries(path)
    index = _json(path, entries, "model_index.json")
    found = sorted((name for name in index if is_denoiser(name)), key=denoiser_order)
    components = [name for name in found if f"{name}/config.json" in entries]
    if not components:
        raise InputError(
            f"{path}: this pipeline ({index.get('_class_name')}) has neither a transformer nor a unet",
            hint="svdq quantizes diffusion transformers and UNets",
            where=str(path),
            kind="unknown-family",
        )
    sources = [_component(path, entries, component, base) for component in components]
    if base is not None:
        _require_same_class(path, sources[0], base)
    others = sorted({name.split("/")[0] for name in entries if "/" in name} - set(components))
    return _with_warning(joined(sources), others)


def _entries(path: Path) -> Mapping[str, Any]:
    from huggingface_hub import read_dduf_file

    try:
        return read_dduf_file(path)
    except Exception as error:  # the package's own kinds, zipfile's, and what broken numbers raise
        raise damaged(path, f"not a readable DDUF file ({type(error).__name__}: {error})") from error


def _json(path: Path, entries: Mapping[str, Any], name: str) -> Mapping[str, object]:
    entry = entries[name]
    try:
        value = json.loads(entry.read_text()) if entry.length <= _JSON_LIMIT else None
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise damaged(path, f"{name} in it is not a JSON object")
    return value


def _component(path: Path, entries: Mapping[str, Any], component: str, base: Path | None) -> Source:
    config = _json(path, entries, f"{component}/config.json")
    refuse_quantized_config(path, config)
    stored: dict[str, StoredTensor] = {}
    for name in _weight_names(path, entries, component):
        found = read_whole_header(path, at=(entries[name].offset, entries[name].length)).tensors
        if twice := sorted(stored.keys() & found.keys()):
            raise damaged(path, f"{twice[0]!r} is in two shards of {component}")
        stored |= found
    read = upconverted(path, stored)
    return Source(
        path, base, component, config, read.tensors, kind="DDUF", warnings=tuple(read.warnings(path))
    )


def _weight_names(path: Path, entries: Mapping[str, Any], component: str) -> list[str]:
    for whole in _WHOLE:
        if f"{component}/{whole}" in entries:
            return [f"{component}/{whole}"]
    names = [name for name in entries if name.startswith(f"{component}/") and name.endswith(".safetensors")]
    if not names:
        raise InputError(
            f"{path}: {component} has no weights in it", hint="download the file again", where=str(path)
        )
    return [str(file.relative_to(path)) for file in whole_set([path / name for name in names])]


def _require_same_class(path: Path, source: Source, base: Path) -> None:
    config = component_config(base)
    there = config.get("_class_name") if config else None
    if config is not None and there != source.config.get("_class_name"):
        raise InputError(
            f"{path} is a {source.config.get('_class_name')}, but the base {base} is a {there}",
            hint=f"give this pipeline's own folder: unpack it with {_unpack(path)}",
            where=str(base),
            kind="wrong-base",
        )


def _with_warning(source: Source, others: list[str]) -> Source:
    where = f"come from {source.pipeline}" if source.pipeline else "are left out"
    return replace(
        source,
        warnings=(
            *source.warnings,
            f"{source.path}: only the denoiser of a DDUF file is read; its other parts ({', '.join(others)}) {where}; "
            f"for the whole pipeline unpack it ({_unpack(source.path)}) and give that folder",
        ),
    )


def _unpack(path: Path) -> str:
    return f"`unzip {path.name} -d {path.stem}`"


def is_dduf(path: Path) -> bool:
    """DDUF by its name, or a ZIP archive with a pipeline's index: a pickle is a ZIP archive too."""
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
        with zipfile.ZipFile(path) as archive:
            return "model_index.json" in archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
