"""Prompts as people keep them: lists, tables, JSON, and captions next to the images they describe.

Tables and JSON are read with Python's own readers, which refuse what they can't split into cells; Parquet, and folders
of data files, through `datasets`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.calibration.columns import column_of, text_of
from svdq_cli.calibration.prompt_sets import prompts_by_image
from svdq_cli.calibration.prompts import dataset_prompts, read_prompts, read_text, refuse_no_prompt
from svdq_cli.calibration.shards import CAPTION_KINDS, samples_of
from svdq_cli.errors import InputError, UsageError
from svdq_cli.storage.images import READ_SUFFIXES
from svdq_cli.storage.pipeline_index import is_pipeline
from svdq_cli.storage.videos import VIDEO_SUFFIXES

CAPTION_SUFFIXES = tuple(f".{kind}" for kind in CAPTION_KINDS)
_CAPTIONED_SUFFIXES = {*READ_SUFFIXES, *VIDEO_SUFFIXES, ".avi", ".webm"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_METADATA = ("metadata.jsonl", "metadata.csv")  # captions of an image folder, as `datasets` reads them
_DATA_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_OTHER_SUFFIXES = {
    **{suffix: "an image" for suffix in (*READ_SUFFIXES, ".gif", ".avif")},
    **{suffix: "a model or a LoRA" for suffix in _WEIGHT_SUFFIXES},
    **{suffix: "a spreadsheet" for suffix in (".xlsx", ".xls", ".ods")},
    **{suffix: "an archive" for suffix in (".zip", ".gz", ".7z", ".arrow", ".zst", ".xz", ".bz2")},
    **{suffix: "a document" for suffix in (".rtf", ".docx", ".doc", ".odt", ".pdf")},
    **{suffix: "settings" for suffix in (".toml", ".ini", ".cfg")},
}
_CURES = {
    "an image": "write what to generate as text, one prompt per line; images to edit are the recipe's `image`",
    "a model or a LoRA": "LoRAs are named with --lora; write the prompts as text, one per line",
    "a spreadsheet": "save it as CSV, with a column `prompt`",
    "a document": "save it as plain text, one prompt per line",
    "settings": "write prompts as text, one per line; image size and steps are options (--width, --height, --steps)",
    "an archive": "unpack it, and give the file or folder inside",
}
_ONE_A_LINE = (
    "give a text file with one prompt per line, a table with a column `prompt`, or a folder of captions"
)
_MAX_CAPTIONS = 1_000_000
_NAMED_KINDS = 8  # in an error


@dataclass(frozen=True, slots=True)
class PromptList:
    """Prompts, and in words where they were: "column caption of p.csv"."""

    texts: tuple[str, ...]
    origin: str


def prompts_in(path: Path, *, column: str | None = None) -> PromptList:
    """The prompts of a file or folder that is there, whatever its kind.

    `column`: of a table or of JSON objects; None: the first of `USUAL_COLUMNS` that is there, whatever its case.
    Raises InputError for a file of another kind, one that is damaged, and one without prompts.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _of_folder(path, column)
    if kind := _OTHER_SUFFIXES.get(suffix):
        raise InputError(f"{path}: {kind}, not a file of prompts", hint=_CURES[kind], where=str(path))
    match suffix:
        case ".csv" | ".tsv":
            return _of_rows(path, _table_rows(path, _DELIMITERS[suffix]), column)
        case ".jsonl" | ".ndjson":
            return _of_values(path, _json_lines(path), column)
        case ".json":
            return _of_json(path, column)
        case ".parquet":
            return _of_data_set(str(path), column)
        case ".tar":
            return _of_shards((path,), column)
        case ".yaml" | ".yml":
            return _of_yaml(path, column)
        case _:
            return _of_lines(path, column)


# ------------------------------------------------------------------------------------------------- lists


def _of_lines(path: Path, column: str | None) -> PromptList:
    if column is not None:
        raise UsageError(
            f"--prompt-column {column}: {path} is a list, one prompt per line, and has no columns",
            hint="leave --prompt-column out, or give a .csv, .tsv, .json, .jsonl or .parquet file",
            where="--prompt-column",
        )
    return PromptList(read_prompts(path), f"{path}, one per line")


def _of_yaml(path: Path, column: str | None) -> PromptList:
    if all(re.search(rf"^{key}:", read_text(path), re.MULTILINE) for key in ("version", "model")):
        raise InputError(
            f"{path}: a recipe, not a file of prompts",
            hint=f"convert with it (svdq convert {path}), or give the prompts that it names",
            where=str(path),
        )
    if column is not None:
        return _of_lines(path, column)
    return PromptList(prompts_by_image(path), f"{path}, by image")


# ------------------------------------------------------------------------------------------------- tables


def _table_rows(path: Path, delimiter: str) -> Iterator[Mapping[str, object]]:
    """The rows under a header. InputError for a row that does not fit it: a prompt with a comma that is not quoted."""
    text = read_text(path)
    header_line = text.partition("\n")[0]
    if delimiter == "," and ";" in header_line and "," not in header_line:
        delimiter = ";"  # as spreadsheets save it where a comma is the decimal mark
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise InputError(f"{path}: holds no prompt", hint=_ONE_A_LINE, where=str(path))
        _require_distinct(path, header)
        for row in reader:
            if not row or row == [""]:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{path}:{reader.line_num}: {len(row)} cells, and the header has {len(header)}",
                    hint=f'put quotes around a prompt that holds "{_visible(delimiter)}"',
                    where=f"{path}:{reader.line_num}",
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _unreadable(path, f"line {reader.line_num}: {error}") from error


def _require_distinct(path: Path, header: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(header).items() if count > 1), None)
    if twice is not None:
        raise _unreadable(path, f"two columns are called {twice!r}")


def _visible(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else delimiter


def _of_rows(path: Path, rows: Iterable[Mapping[str, object]], column: str | None) -> PromptList:
    """One column's cells; empty ones are skipped."""
    texts: list[str] = []
    chosen: str | None = None
    for number, row in enumerate(rows, 1):
        if chosen is None:
            chosen = column_of(path, list(row), column, sole_is_enough=path.suffix.lower() not in _DELIMITERS)
        if chosen not in row:
            raise _unreadable(path, f"entry {number} has no {chosen!r}, unlike those before it")
        cell = row[chosen]
        if cell is None:
            continue
        prompt = text_of(cell)
        if prompt is None:
            raise InputError(
                f"{path}: column {chosen!r} holds {type(cell).__name__}, not text",
                hint=f"name the column that holds the prompts with --prompt-column; the columns are {', '.join(row)}",
                where=str(path),
            )
        if text := " ".join(prompt.split()):
            texts.append(text)
    refuse_no_prompt(path, texts)
    return PromptList(tuple(texts), f"column {chosen} of {path}")


# ------------------------------------------------------------------------------------------------- JSON


def _json_lines(path: Path) -> Iterator[object]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(path, f"line {number}: {error}") from error


def _of_json(path: Path, column: str | None) -> PromptList:
    """A list of texts or of objects, prompts by image, columns, or lines of JSON under a name that ends in .json."""
    text = read_text(path)
    try:
        content: object = json.loads(text)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise _unreadable(path, str(error)) from error
        return _of_values(path, _json_lines(path), column)
    except RecursionError as error:
        raise _unreadable(path, "too deeply nested") from error
    if isinstance(content, list):
        return _of_values(path, content, column)
    if isinstance(content, dict):
        return _of_object(path, content, column)
    raise _unreadable(path, f"{type(content).__name__} instead of a list")


def _of_object(path: Path, content: Mapping[str, object], column: str | None) -> PromptList:
    _refuse_workflow(path, content)
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if lists:  # {"prompt": [...]}
        chosen = column_of(path, list(lists), column)
        found = _of_values(path, lists[chosen], None)
        return PromptList(found.texts, f"column {chosen} of {path}")
    if column is None and all(isinstance(value, str) for value in content.values()):
        texts = [" ".join(str(value).split()) for value in content.values()]
        refuse_no_prompt(path, [text for text in texts if text])
        return PromptList(tuple(text for text in texts if text), f"{path}, by image")
    entries = [entry for entry in content.values() if isinstance(entry, dict)]
    if not entries or len(entries) < len(content):
        raise _unreadable(path, "an object that is neither columns nor prompts by image")
    return _of_rows(path, entries, column)


def _refuse_workflow(path: Path, content: Mapping[str, object]) -> None:
    """InputError for ComfyUI's two forms of a workflow, for its API and for its pages."""
    nodes = [node for node in content.values() if isinstance(node, dict)]
    if ("links" in content and "nodes" in content) or (nodes and all("class_type" in node for node in nodes)):
        raise InputError(
            f"{path}: a ComfyUI workflow, not a file of prompts", hint=_ONE_A_LINE, where=str(path)
        )


def _of_values(path: Path, values: Iterable[object], column: str | None) -> PromptList:
    """Texts, or objects with a column of them; not both."""
    entries = list(values)
    if entries and all(isinstance(entry, str) for entry in entries) and column is None:
        texts = [text for text in (" ".join(str(entry).split()) for entry in entries) if text]
        refuse_no_prompt(path, texts)
        return PromptList(tuple(texts), f"{path}")
    rows: list[Mapping[str, object]] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise _unreadable(path, f"entry {number} is {type(entry).__name__}, not an object with a prompt")
        rows.append(entry)
    return _of_rows(path, rows, column)


# ------------------------------------------------------------------------------------------------- folders


def _of_folder(folder: Path, column: str | None) -> PromptList:
    """Captions next to images, an image folder's metadata, or data files. InputError for a folder of anything else."""
    if is_pipeline(folder):
        raise InputError(
            f"{folder}: a model (a diffusers pipeline), not prompts", hint=_ONE_A_LINE, where=str(folder)
        )
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        return prompts_in(metadata, column=column)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file, folder))
    if files and all(file.suffix.lower() == ".tar" for file in files):
        return _of_shards(files, column)
    images = {file.with_suffix("") for file in files if file.suffix.lower() in _CAPTIONED_SUFFIXES}
    captions = [file for file in files if file.suffix.lower() in CAPTION_SUFFIXES]
    if column is None and captions:
        if images:
            captions = [file for file in captions if file.with_suffix("") in images]
        else:
            _require_captions(folder, captions)
        if captions:
            return _of_captions(folder, captions, images=len(images))
    if any(file.suffix.lower() in _DATA_SUFFIXES for file in files):
        return _of_data_set(str(folder), column)
    what = "images without captions" if images else "no captions"
    raise InputError(
        f"{folder}: holds {what}, and no file of prompts",
        hint=f"write each image's caption into a .txt file with the same name, next to it; or {_ONE_A_LINE}",
        where=str(folder),
    )


def _of_data_set(name: str, column: str | None) -> PromptList:
    found = dataset_prompts(name, column=column)
    return PromptList(found.texts, f"column {found.column} of {name}")


def _of_shards(files: Sequence[Path], column: str | None) -> PromptList:
    """Captions of webdataset shards: a sample's .txt or another text, else a key of its .json."""
    captions: list[str] = []
    rows: list[Mapping[str, object]] = []
    kinds: set[str] = set()
    for file in files:
        for sample in samples_of(file):
            kinds |= sample.texts.keys()
            if (caption := sample.caption(column)) is not None:
                captions.append(" ".join(caption.split()))
            elif sample.facts is not None:
                rows.append(sample.facts)
        if len(captions) + len(rows) > _MAX_CAPTIONS:
            raise _unreadable(file, f"more than {_MAX_CAPTIONS} samples")
    if captions:
        refuse_no_prompt(files[0], [text for text in captions if text])
        return PromptList(tuple(text for text in captions if text), f"captions in {_named(files)}")
    if not rows:
        raise _no_caption(files, kinds, column)
    found = _of_rows(files[0], rows, column)
    return PromptList(found.texts, f"{found.origin.partition(' of ')[0]} of {_named(files)}")


def _no_caption(files: Sequence[Path], kinds: Collection[str], column: str | None) -> InputError:
    """`kinds`: of the texts that there are instead."""
    texts = ", ".join(f".{kind}" for kind in sorted(kinds)[:_NAMED_KINDS])
    what = (
        f"no text .{column}"
        if column
        else "several texts, none of them called a caption"
        if kinds
        else "no text"
    )
    cure = (
        f"name the one that holds the prompts with --prompt-column {min(kinds)}; there is {texts}"
        if kinds
        else f"a sample's prompt is a member of its name with .{', .'.join(CAPTION_KINDS)} or .json; or {_ONE_A_LINE}"
    )
    return InputError(f"{_named(files)}: its samples have {what}", hint=cure, where=str(files[0]))


def _named(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _require_captions(folder: Path, files: Sequence[Path]) -> None:
    """InputError where text files without images are lists rather than captions."""
    for file in files:
        if len([line for line in read_text(file).splitlines() if line.strip()]) > 1:
            raise InputError(
                f"{folder}: a folder of text files, and {file.name} holds many prompts: which file is meant?",
                hint=f"give a file, such as {file}; captions are .txt files next to their images",
                where=str(folder),
            )


def _of_captions(folder: Path, files: Sequence[Path], *, images: int) -> PromptList:
    """A file is one prompt, whatever lines it is broken into; empty ones are skipped."""
    if len(files) > _MAX_CAPTIONS:
        raise _unreadable(folder, f"{len(files)} files")
    texts = [text for text in (" ".join(read_text(file).split()) for file in files) if text]
    refuse_no_prompt(folder, texts)
    lacking = images - len(files)
    more = f"; {lacking} images have none" if images and lacking else ""
    return PromptList(tuple(texts), f"captions in {folder}{more}")


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: can't be read as prompts: {why}", hint=f"fix the file, or {_ONE_A_LINE}", where=str(path)
    )
