"""Diffusers folders: a whole pipeline (`model_index.json`) or one component (`config.json` beside its weights)."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.source.float8 import float8_upconverted
from svdq_cli.source.headers import damaged, pickled, read_header, read_json
from svdq_cli.source.model import COMPONENTS, Source
from svdq_cli.source.quantized import refuse_quantized, refuse_quantized_config
from svdq_cli.source.tensors import StoredTensor

_WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


def open_pipeline(path: Path) -> Source:
    """A pipeline folder's transformer or UNet."""
    component = quantized_component(path)
    folder = path / component
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: config.json is missing",
            hint="the download is incomplete; fetch the folder again",
            where=str(folder),
        )
    return replace(open_component(folder, pipeline=path, component=component), path=path)


def quantized_component(pipeline: Path) -> str:
    """The part of a pipeline that svdq quantizes. Raises InputError where there is none."""
    index = pipeline_index(pipeline)
    for component in COMPONENTS:
        if component in index:
            return component
    raise InputError(
        f"{pipeline}: this pipeline ({index.get('_class_name')}) has neither a transformer nor a unet",
        hint="svdq quantizes diffusion transformers and UNets",
        where=str(pipeline),
        kind="unknown-family",
    )


def pipeline_index(pipeline: Path) -> Mapping[str, object]:
    """`model_index.json`. Raises InputError where a component's name would lead out of the folder."""
    path = pipeline / "model_index.json"
    index = read_json(path)
    for name in index:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise InputError(
                f"{path}: the component {name!r} is no folder's name",
                hint="do not use this model: its index was made to reach other folders",
                where=str(path),
                kind="unsafe-path",
            )
    return index


def component_files(pipeline: Path, *, skip: str) -> Iterator[Path]:
    """The files of all components but `skip`. Raises InputError for what no copy can be made of."""
    for name in pipeline_index(pipeline):
        folder = pipeline / name
        if name != skip and not name.startswith("_") and folder.is_dir():
            yield from _plain_files(folder)


def _plain_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _not_copyable(path, f"a link that leads nowhere ({error.strerror})") from error
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            raise _not_copyable(path, "a device or a pipe, not a file")
        elif path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            raise _not_copyable(path, "a link to a folder that it lies in")
        else:
            yield from _plain_files(path)


def _not_copyable(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: {what}",
        hint="restore the file, or download the model again",
        where=str(path),
        kind="not-a-file",
    )


def open_component(folder: Path, *, pipeline: Path | None, component: str) -> Source:
    """One component folder, at 16 bit or up-converted to it. Raises InputError for a quantized one, by name."""
    refuse_quantized_config(folder, read_json(folder / "config.json"))
    stored = _stored_tensors(folder)
    refuse_quantized(folder, stored)
    tensors, warnings = float8_upconverted(folder, stored)
    return replace(_component(folder, pipeline, component, stored), tensors=tensors, warnings=warnings)


def index_component(folder: Path, *, pipeline: Path | None, component: str) -> Source:
    """Index one component folder, quantized or not: its config and every tensor its headers name."""
    source = _component(folder, pipeline, component, _stored_tensors(folder))
    return replace(source, path=pipeline or folder)


def _component(
    folder: Path, pipeline: Path | None, component: str, tensors: Mapping[str, StoredTensor]
) -> Source:
    return Source(folder, pipeline, component, read_json(folder / "config.json"), tensors)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        entries = read_header(file)
        if twice := sorted(tensors.keys() & entries.keys()):
            raise damaged(file, f"{twice[0]!r} is in another shard too")
        tensors.update(entries)
    return tensors


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component folder: one file, or the shards its index names."""
    for stem in _WEIGHT_NAMES:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(folder, index)
        if (folder / f"{stem}.safetensors").is_file():
            return (folder / f"{stem}.safetensors",)
    if variants := sorted(file for stem in _WEIGHT_NAMES for file in folder.glob(f"{stem}.*.safetensors")):
        raise InputError(
            f"{folder}: the weights are there as a variant only ({variants[0].name})",
            hint="load the pipeline in diffusers with that variant and save it, or rename the files of every component",
            where=str(variants[0]),
            kind="variant-only",
        )
    if pickles := sorted(file for pattern in _PICKLES for file in folder.glob(pattern)):
        raise pickled(pickles[0])
    return ()


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise damaged(index, "it has no weight_map")
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
