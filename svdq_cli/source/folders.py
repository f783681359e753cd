"""Diffusers folders: a whole pipeline (`model_index.json`, or `modular_model_index.json` of Modular Diffusers), or one
component (`config.json` next to its weights)."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.source.classes import shapes_of
from svdq_cli.source.denoisers import joined
from svdq_cli.source.headers import Header, file_sha256, read_whole_header
from svdq_cli.source.model import COMPONENTS, Source, described_config
from svdq_cli.source.modular_index import UNUSED_COMPONENTS, is_left_out, own_class
from svdq_cli.source.other_files import is_openvino_weights, refuse_exports
from svdq_cli.source.prefixes import find_model, is_wrapped
from svdq_cli.source.quantized import refuse_quantized_config
from svdq_cli.source.tensors import StoredTensor
from svdq_cli.source.upconverted import upconverted
from svdq_cli.source.variants import WEIGHT_NAMES, chosen_variant, spare_files, variant_files, variant_of
from svdq_cli.storage.headers import damaged, pickled
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import INDEXES, index_file

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"-(\d{1,6})-of-(\d{1,6})(?:(?:\.\w+)?\.safetensors|\.gguf)$")
# What pipelines call their denoisers: transformer, transformer_2, unet, unconditional_transformer.
_DENOISER = re.compile(r"([a-z]+_)?(transformer|unet)(_\d+)?")
_SETTINGS = (".json", ".txt", ".model", ".jinja")
_LARGEST_SETTINGS = 64 * 2**20  # bytes; the largest tokenizer.json in use has 33 million
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
# What trainers keep next to the weights in order to resume: no model
_TRAINER_STATE = re.compile(
    r"(optimizer|(lr_)?scheduler|training_args|random_states|rng_state|scaler)([._-].*)?"
)


def open_pipeline(path: Path) -> Source:
    """A pipeline folder's transformer or UNet, or all of them."""
    return joined([_denoiser(path, component) for component in denoiser_components(path)])


def _denoiser(path: Path, component: str) -> Source:
    folder = path / component
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: config.json is missing",
            hint="the download is incomplete; fetch the folder again",
            where=str(folder),
        )
    return replace(open_component(folder, pipeline=path, component=component), path=path)


def quantized_component(pipeline: Path) -> str:
    """The first of `denoiser_components`."""
    return denoiser_components(pipeline)[0]


def denoiser_components(pipeline: Path) -> tuple[str, ...]:
    """The parts of a pipeline that svdq quantizes: transformers and UNets, the first of them first (Wan 2.2 has
    transformer and transformer_2). Raises InputError where there is none."""
    index = pipeline_index(pipeline)
    # a component that the pipeline does without is [null, null]
    there = [name for name, value in index.items() if not isinstance(value, list) or value[:1] != [None]]
    found = [name for name in there if is_denoiser(name)]
    if found:
        return tuple(sorted(found, key=denoiser_order))
    raise InputError(
        f"{pipeline}: this pipeline ({index.get('_class_name')}) has neither a transformer nor a unet",
        hint="svdq quantizes diffusion transformers and UNets",
        where=str(pipeline),
        kind="unknown-family",
    )


def text_encoders_of(pipeline: Path) -> tuple[str, ...]:
    """The components of a pipeline that are models of transformers and read text, by their names."""
    index = pipeline_index(pipeline)
    return tuple(
        name
        for name, value in index.items()
        if name.startswith("text_encoder") and isinstance(value, list) and value[:1] == ["transformers"]
    )


def is_denoiser(component: str) -> bool:
    """Whether a pipeline's component of that name is what svdq quantizes."""
    return _DENOISER.fullmatch(component) is not None


def denoisers_in(folder: Path, base: Path | None) -> tuple[str, ...]:
    """The folders below one without an index that are a denoiser of `base`, or of any pipeline, as trainers save it."""
    names = denoiser_components(base) if base else COMPONENTS
    return tuple(name for name in names if (folder / name / "config.json").is_file())


def denoiser_order(component: str) -> tuple[bool, str]:
    """The sort key of a pipeline's denoisers."""
    return component not in COMPONENTS, component


def component_config(pipeline: Path) -> Mapping[str, object] | None:
    """The config of the part that svdq quantizes, as it was before any quantization; None where the pipeline lacks
    it."""
    file = pipeline / quantized_component(pipeline) / "config.json"
    if not file.is_file():
        return None
    return {key: value for key, value in read_json(file).items() if key != "quantization_config"}


def pipeline_index(pipeline: Path) -> Mapping[str, object]:
    """The index: components as [library, class], or [null, null] where the pipeline does without. Raises InputError
    where a component's name would lead out of the folder."""
    path = index_file(pipeline) or pipeline / INDEXES[0]
    index = read_json(path)
    for name in index:
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise InputError(
                f"{path}: the component {name!r} is not a valid folder name",
                hint="do not use this model: its index points outside its folder",
                where=str(path),
                kind="unsafe-path",
            )
    return {name: _class_there(pipeline, name, value) for name, value in index.items()}


def _class_there(pipeline: Path, name: str, value: object) -> object:
    """An entry of the index; [null, null] for what blocks of Modular Diffusers could take, and nothing is said of."""
    entry = own_class(value)
    if entry is value or (pipeline / name).is_dir():
        return entry
    return [None, None] if name in UNUSED_COMPONENTS or is_left_out(value) else entry


def component_files(pipeline: Path, *, skip: Collection[str]) -> Iterator[Path]:
    """The files of all components but those to `skip`. Raises InputError for what no copy can be made of."""
    for name in pipeline_index(pipeline):
        folder = pipeline / name
        if name not in skip and not name.startswith("_") and folder.is_dir():
            spare = unread_variants(folder)
            yield from (file for file in _plain_files(folder) if file.name not in spare)


def unread_variants(folder: Path) -> set[str]:
    """The names of a component's files that hold its weights once more, as a variant that is not read."""
    return spare_files([file.name for file in folder.iterdir()], chosen_variant(folder))


def components_digest(source: Source) -> str | None:
    """sha256 of what a pipeline's other components bring to its images: the scheduler's settings, configs and
    tokenizers as they are, weights by their sizes. None for a source without a pipeline."""
    if source.pipeline is None:
        return None
    digest = hashlib.sha256(json.dumps(described_config(source.scheduler), sort_keys=True).encode())
    for file in sorted(component_files(source.pipeline, skip=source.components)):
        size = file.stat().st_size
        content = file_sha256(file) if file.suffix in _SETTINGS and size <= _LARGEST_SETTINGS else size
        digest.update(f"{file.relative_to(source.pipeline).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _plain_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _not_copyable(path, f"a broken link ({error.strerror})") from error
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            raise _not_copyable(path, "a device or a pipe, not a file")
        elif path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            raise _not_copyable(path, "a link to a folder that contains it")
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
    """One component folder, at 16 bits or up-converted to it. Raises InputError for a quantized one, by name."""
    config = read_json(folder / "config.json")
    refuse_quantized_config(folder, config)
    stored = _unwrapped(folder, config, _stored_tensors(folder))
    read = upconverted(folder, stored)
    source = _component(folder, pipeline, component, stored)
    return replace(source, tensors=read.tensors, warnings=(*read.warnings(folder), *_variant_warning(folder)))


def _variant_warning(folder: Path) -> tuple[str, ...]:
    variant = chosen_variant(folder)
    return () if variant is None else (f"{folder}: read from variant {variant}, the only weights there",)


def index_component(folder: Path, *, pipeline: Path | None, component: str) -> Source:
    """Index one component folder, quantized or not: its config and every tensor its headers name."""
    source = _component(folder, pipeline, component, _stored_tensors(folder))
    return replace(source, path=pipeline or folder)


def _unwrapped(
    folder: Path, config: Mapping[str, object], stored: Mapping[str, StoredTensor]
) -> Mapping[str, StoredTensor]:
    """The tensors by their names in the model, where a trainer saved the model inside of its wrappers."""
    if not any(map(is_wrapped, stored)):
        return stored
    part = find_model(stored, (), lambda: shapes_of(config, where=str(folder)))
    return stored if part.rest else part.tensors


def _component(
    folder: Path, pipeline: Path | None, component: str, tensors: Mapping[str, StoredTensor]
) -> Source:
    return Source(folder, pipeline, component, read_json(folder / "config.json"), tensors)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    return dict(header_of_files(weight_files(folder)).tensors)


def component_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What a component's headers name; nothing where its weights are not there as safetensors."""
    try:
        return _stored_tensors(folder) if folder.is_dir() else {}
    except InputError:
        return {}


def header_of_files(files: Sequence[Path]) -> Header:
    """The tensors of a model's shards, and what their headers say. Raises InputError where one is in two of them."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = read_whole_header(file)
        if twice := sorted(tensors.keys() & header.tensors.keys()):
            raise damaged(file, f"{twice[0]!r} is in two shards")
        tensors.update(header.tensors)
        metadata.update(header.metadata)
    return Header(tensors, metadata)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a component folder: one file, the shards its index names, a whole set of shards without
    an index, or a variant where there is nothing else. Raises InputError where a shard is missing, or the weights are
    there in another way only: as several variants, a pickle, or another framework's."""
    for stem in WEIGHT_NAMES:
        index = folder / f"{stem}{INDEX_SUFFIX}"
        if index.is_file():
            return _shards(folder, index)
        if (folder / f"{stem}.safetensors").is_file():
            return (folder / f"{stem}.safetensors",)
        shards = [file for file in folder.glob(f"{stem}-*-of-*.safetensors") if variant_of(file.name) is None]
        if shards:
            return whole_set(sorted(shards))
    if (variant := chosen_variant(folder)) is not None and (files := variant_files(folder, variant)):
        return whole_set(files) if len(files) > 1 or any(map(shard_number, files)) else files
    pickles = sorted(
        file
        for pattern in _PICKLES
        for file in folder.glob(pattern)
        if not is_openvino_weights(file) and not _TRAINER_STATE.fullmatch(file.name)
    )
    if pickles:
        raise pickled(pickles[0])
    if folder.is_dir():
        refuse_exports(folder)
    return ()


def shard_number(file: Path) -> tuple[int, int] | None:
    """2 and 3 of `model-00002-of-00003.safetensors`; None for a file that is not a shard, or the only one."""
    found = _SHARD.search(file.name)
    number, total = (int(found[1]), int(found[2])) if found else (1, 1)
    return (number, total) if total > 1 else None


def whole_set(files: Sequence[Path]) -> tuple[Path, ...]:
    """The shards of one model in their order. Raises InputError where one is missing."""
    found = {number: file for file in files if (number := shard_number(file)) is not None}
    totals = sorted({total for _, total in found})
    if len(totals) > 1:
        raise InputError(
            f"{files[0].parent}: shards of two different sets, one of {totals[0]} and one of {totals[1]}",
            hint="keep only the files of one model in the folder",
            where=str(files[0].parent),
        )
    missing = [n for total in totals for n in range(1, total + 1) if (n, total) not in found]
    if missing:
        some = ", ".join(str(number) for number in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{files[0].parent}: of the {totals[0]} shards of this model {len(missing)} are missing (number {some})",
            hint="download them again",
            where=str(files[0].parent),
            kind="not-found",
        )
    return tuple(sorted(files))


def model_files(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that holds one model and nothing else, under whatever names: a set of shards, or one file.

    Empty where there are no safetensors files. Raises InputError where there are several that are no set.
    """
    if files := weight_files(folder):
        return files
    files = tuple(sorted(folder.glob("*.safetensors")))
    stems = {_SHARD.sub("", file.name) for file in files}
    if len(files) > 1 and (len(stems) > 1 or None in map(shard_number, files)):
        raise InputError(
            f"{folder}: neither a pipeline nor one model: it holds {', '.join(file.name for file in files[:5])}",
            hint="give one of these files, or a diffusers pipeline folder (the one with model_index.json)",
            where=str(folder),
        )
    return whole_set(files) if len(files) > 1 or any(map(shard_number, files)) else files


def one_shard(path: Path, number: int, total: int) -> InputError:
    joined = "join them with llama.cpp's `llama-gguf-split --merge`, and give the result"
    return InputError(
        f"{path}: shard {number} of {total}: only a part of a model",
        hint=joined if path.suffix == ".gguf" else f"give the folder with all {total} shards: {path.parent}",
        where=str(path),
        kind="one-shard",
    )


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
