"""The 16-bit model on disk: found, indexed from its headers, read one tensor at a time.

A source is a diffusers pipeline folder (`model_index.json`, or `modular_model_index.json` of Modular Diffusers), the
folder of one component (`config.json` next to its weights), a single file under any of the names in use, or a bare
`config.json` (enough for `svdq inspect`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from svdq_cli.errors import InputError
from svdq_cli.source.classes import shapes_of
from svdq_cli.source.dduf import is_dduf, open_dduf
from svdq_cli.source.denoisers import (
    by_component,
    component_of,
    denoisers_of,
    joined,
    named_denoiser,
    only,
    prefix_of,
    take_turns,
)
from svdq_cli.source.experts import is_expert, stacks_of, take_experts_apart, with_single_experts
from svdq_cli.source.folders import (
    INDEX_SUFFIX,
    component_config,
    component_files,
    components_digest,
    denoiser_components,
    denoiser_order,
    denoisers_in,
    index_component,
    is_denoiser,
    model_files,
    one_shard,
    open_component,
    open_pipeline,
    pipeline_index,
    shard_number,
    text_encoders_of,
    unread_variants,
    weight_files,
)
from svdq_cli.source.gguf_file import open_gguf
from svdq_cli.source.headers import file_sha256, is_gguf, read_header
from svdq_cli.source.model import (
    COMPONENTS,
    Source,
    described_config,
    read_tensor,
    source_digest,
    tensor_entry,
    tensors_sha256,
)
from svdq_cli.source.other_files import refuse_exports, refuse_other_components
from svdq_cli.source.prediction import has_settings, needed_settings, scheduler_config
from svdq_cli.source.single_file import has_original_names, open_single_file
from svdq_cli.source.tensors import TensorEntry, is_finite
from svdq_cli.storage.headers import pickled
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import INDEXES, is_pipeline

__all__ = [
    "COMPONENTS",
    "Source",
    "TensorEntry",
    "by_component",
    "component_config",
    "component_files",
    "component_of",
    "components_digest",
    "denoiser_components",
    "denoiser_order",
    "denoisers_of",
    "described_config",
    "file_sha256",
    "has_settings",
    "index_component",
    "is_denoiser",
    "is_expert",
    "is_finite",
    "joined",
    "named_denoiser",
    "needed_settings",
    "only",
    "open_source",
    "pipeline_index",
    "prefix_of",
    "read_header",
    "read_tensor",
    "scheduler_config",
    "source_digest",
    "stacks_of",
    "take_experts_apart",
    "take_turns",
    "tensor_entry",
    "tensors_sha256",
    "text_encoders_of",
    "unread_variants",
    "weight_files",
]

_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def open_source(path: Path, *, base: Path | None = None) -> Source:
    """Index a source without reading weights. Stacked experts are one matrix each (`source.experts`).

    `base` is a pipeline folder for the parts that the source lacks: the other components, and a single file's config.
    Raises InputError naming the file and the cure.
    """
    return with_single_experts(_opened(path, base))


def _opened(path: Path, base: Path | None) -> Source:
    if base is not None and not is_pipeline(base):
        raise InputError(
            f"{base}: not a pipeline folder (it has no {' and no '.join(INDEXES)})",
            hint=_snapshot_of(base) or "--base is a whole diffusers pipeline: a folder or a Hub id",
            where=str(base),
        )
    if path.is_dir():
        return _open_folder(path, base)
    if path.is_file() and (number := shard_number(path)):
        raise one_shard(path, *number)
    if path.name.endswith(INDEX_SUFFIX) and path.is_file():
        return _open_folder(path.parent, base)
    if path.suffix == ".json" and path.is_file():
        config = read_json(path)
        refuse_other_components(path, config)
        return Source(path, None, "transformer", config, MappingProxyType({}))
    if path.is_file() and is_dduf(path):
        return open_dduf(path, base=base)
    if path.is_file():
        refuse_exports(path)
    if path.suffix.lower() in _PICKLE_SUFFIXES and path.is_file():
        raise pickled(path)
    if path.is_file():
        return open_gguf(path, base=base) if is_gguf(path) else open_single_file(path, base=base)
    raise InputError(
        f"{path}: {'neither a file nor a folder' if path.exists() else 'no such file or folder'}",
        hint="give a diffusers pipeline folder, or a .safetensors or .gguf file",
        where=str(path),
        kind="not-found",
    )


def _open_folder(path: Path, base: Path | None) -> Source:
    if is_pipeline(path):
        if base is not None:
            raise InputError(
                f"{path} is a whole pipeline and needs no base",
                hint="leave --base out",
                where=str(base),
                kind="needless-base",
            )
        return open_pipeline(path)
    has_config = (path / "config.json").is_file()
    refuse_other_components(path, read_json(path / "config.json") if has_config else None)
    if has_config:
        known = denoiser_components(base) if base else COMPONENTS
        component = path.name if path.name in known else known[0]
        source = open_component(path, pipeline=base, component=component)
        if not has_original_names(source.tensors) or _named_as_its_class(source):
            return source
    if not has_config and (saved := denoisers_in(path, base)):
        return _saved_by_a_trainer(path, saved, base)
    # A model's own repository, or shards alone: one model under whatever names, in one file or several
    if files := model_files(path):
        return open_single_file(path, base=base, files=files)
    if gguf := sorted(path.glob("*.gguf")):
        raise InputError(
            f"{path}: a folder with {len(gguf)} GGUF file{'s' if len(gguf) > 1 else ''} and no pipeline",
            hint=f"give the file: {gguf[0]}",
            where=str(gguf[0]),
        )
    raise InputError(
        f"{path}: none of {', '.join(INDEXES)} and config.json is in this folder",
        hint=_snapshot_of(path) or "give a diffusers pipeline folder (the one with model_index.json)",
        where=str(path),
    )


def _saved_by_a_trainer(path: Path, saved: Sequence[str], base: Path | None) -> Source:
    """A trainer's checkpoint: the component that it trained in a folder below `path`, without the rest of the
    pipeline."""
    if len(saved) > 1:
        raise InputError(
            f"{path}: holds {' and '.join(saved)}, but no pipeline (none of {', '.join(INDEXES)})",
            hint=f"give one of them, {path / saved[0]}, or add the pipeline's index and other components",
            where=str(path),
        )
    source = _open_folder(path / saved[0], base)
    averaged = path / f"{saved[0]}_ema"
    if not (averaged / "config.json").is_file():
        return source
    warning = f"{path}: read from {saved[0]}; for the averaged weights give {averaged}"
    return replace(source, warnings=(*source.warnings, warning))


def _snapshot_of(path: Path) -> str | None:
    """Where the files are of a repository in the Hub's cache (`models--owner--name`); None for any other folder."""
    snapshots = sorted(path.glob("snapshots/*/"), key=lambda folder: folder.stat().st_mtime)
    if not snapshots:
        return None
    main = path / "refs/main"
    current = path / "snapshots" / main.read_text().strip() if main.is_file() else snapshots[-1]
    _, _, name = path.name.partition("models--")
    by_id = f", or its Hub id: {name.replace('--', '/', 1)}" if name else ""
    return f"a repository in the Hub's cache: give its snapshot, {current}{by_id}"


def _named_as_its_class(source: Source) -> bool:
    """Whether a component's tensors have the names of the class in its config, though they begin as another model's
    original ones do."""
    if "_class_name" not in source.config:
        return False
    try:
        return source.tensors.keys() == shapes_of(source.config, where=str(source.path)).keys()
    except InputError:
        return False
