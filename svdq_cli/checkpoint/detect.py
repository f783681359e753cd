"""Which format a path on disk is in: by what it says of itself or, where a file has lost its header, by its tensors."""

from __future__ import annotations

from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.formats import all_formats
from svdq_cli.formats.contract import Format
from svdq_cli.source import Source, denoiser_order, is_denoiser, pipeline_index, read_header
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import is_pipeline
from svdq_cli.storage.tensor_file import DTYPE_OF_NAME, TensorSpec

STORED_DTYPES = ("BF16", "F16", "F32", "I8", "U8", "I32", "F8_E4M3")  # of all formats


def format_of(path: Path) -> Format | None:
    """The format of a checkpoint, by its metadata or, where a file has lost that, by its tensors; None for others."""
    if path.is_file():
        said = file_format(path)
        implied = None if said else lost_metadata(path)
        return implied[0] if implied else said
    folder = _component_folder(path)
    return folder_format(folder) if folder else None


def file_format(path: Path) -> Format | None:
    """The format that a file's header says; None where it says none."""
    return next((fmt for fmt in all_formats() if fmt.single_file and fmt.recognizes(path)), None)


def folder_format(component: Path) -> Format | None:
    """The format that a component's config says; None where it says none."""
    return next((fmt for fmt in all_formats() if not fmt.single_file and fmt.recognizes(component)), None)


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a path holds a quantized model (whatever tool wrote it)."""
    if path.is_file():
        return format_of(path) is not None
    folder = _component_folder(path)
    if folder is None:
        return False
    try:
        return _is_quantized(folder)
    except InputError:
        return False


def lost_metadata(path: Path) -> tuple[Format, dict[str, object]] | None:
    """What the tensors of a file say that svdq's header would, where the header is gone."""
    try:
        tensors = read_header(path)
    except InputError:
        return None
    specs = specs_of_headers(Source(path, None, "transformer", {}, tensors))
    said = ((fmt, fmt.implied_metadata(specs)) for fmt in all_formats() if fmt.single_file)
    return next(((fmt, metadata) for fmt, metadata in said if metadata is not None), None)


def specs_of_headers(source: Source) -> dict[str, TensorSpec]:
    """Shapes and dtypes of all tensors, from the headers."""
    return {
        name: TensorSpec(entry.shape, DTYPE_OF_NAME[entry.dtype])
        for name, entry in source.tensors.items()
        if entry.dtype in STORED_DTYPES
    }


def _component_folder(path: Path) -> Path | None:
    """The first of `component_folders`."""
    return next(iter(component_folders(path)), None)


def component_folders(path: Path) -> list[Path]:
    """The denoisers of a folder: those of a pipeline that are quantized, or the first where none is; or the folder
    itself."""
    if not is_pipeline(path):
        return [path] if (path / "config.json").is_file() else []
    names = [name for name in pipeline_index(path) if is_denoiser(name)]
    there = [
        path / name for name in sorted(names, key=denoiser_order) if (path / name / "config.json").is_file()
    ]
    return [folder for folder in there if _is_quantized(folder)] or there[:1]


def _is_quantized(folder: Path) -> bool:
    return "quantization_config" in read_json(folder / "config.json")
