"""Prompts out of a text file or a column of a data set, and which of them a run uses."""

from __future__ import annotations

import gc
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdq_cli.calibration.columns import column_of, text_of
from svdq_cli.errors import EnvironmentLacksError, InputError, UsageError, first_line
from svdq_cli.recipe import user_path
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.text import counted

# kohya's prompt files say how to sample in the line itself: "a house --n blurry --w 768 --h 512 --s 28"
_SAVED_TO_DISK = "state.json"  # what `Dataset.save_to_disk` writes into its folder
_SAMPLING = re.compile(r"\s--(?:[a-z]|[a-z][a-z])\s+\S.*$")
MAX_PROMPT = 20_000  # characters; text encoders read some 500 tokens, about 2000 characters


def read_text(path: Path) -> str:
    """A file as UTF-8 text. InputError where it is missing, not text, or can't be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such prompt file",
            hint="give a text file with one prompt per line; calib_prompts/ holds ready ones",
            where=str(path),
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start})",
            hint="save the file as UTF-8 text: one prompt per line, or a .csv, .json or .jsonl file",
            where=str(path),
        ) from None
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror})",
            hint="give a readable text file with one prompt per line",
            where=str(path),
        ) from None


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, UTF-8. Blank lines and lines that start with '#' are skipped, and so is the end of a line from
    the first of kohya's options on (`--n`, `--w`, `--h`, ...).

    Raises InputError for a file that is missing, not UTF-8, or holds no prompt.
    """
    prompts = tuple(_prompt_lines(path, read_text(path)))
    refuse_no_prompt(path, prompts)
    return prompts


def refuse_no_prompt(path: Path, prompts: Sequence[str]) -> None:
    """InputError for an empty list, and for a prompt that can't be meant as one."""
    if not prompts:
        raise InputError(
            f"{path}: holds no prompt",
            hint="write one prompt per line; blank lines and lines that start with '#' are skipped",
            where=str(path),
        )
    for number, prompt in enumerate(prompts, 1):
        if wrong := _not_a_prompt(prompt):
            raise InputError(
                f"{path}: prompt {number}: {wrong}", hint="write prompts in plain text", where=str(path)
            )


def _prompt_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        prompt = _SAMPLING.sub("", line.strip())
        if not prompt or prompt.startswith("#"):
            continue
        if wrong := _not_a_prompt(prompt):
            raise InputError(
                f"{path}:{number}: {wrong}",
                hint="write one prompt per line, in plain text",
                where=f"{path}:{number}",
            )
        yield prompt


def _not_a_prompt(text: str) -> str | None:
    """Why a line can't be meant as a prompt, or None."""
    if len(text) > MAX_PROMPT:
        return f"a prompt of {len(text)} characters (at most {MAX_PROMPT} are read)"
    control = next((mark for mark in text if unicodedata.category(mark) == "Cc" and mark != "\t"), None)
    return None if control is None else f"a control character ({control!r})"


@dataclass(frozen=True, slots=True)
class ColumnPrompts:
    """The prompts of a data set, and the column that they were in."""

    texts: tuple[str, ...]
    column: str


def dataset_prompts(
    name_or_path: str,
    *,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
    limit: int | None = None,
) -> ColumnPrompts:
    """The first `limit` prompts of one column of a data set.

    It is a Hub name, a local Parquet file, or a folder of data files. Rows are streamed, so that a large data set is
    not downloaded for a few prompts, and nothing is cached.
    Without `split`, "train" is read, or the only split there is. Without `column`, one of the usual names
    (`columns.USUAL_COLUMNS`). Empty cells are skipped.
    Raises InputError for a data set that can't be read and for a missing column.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}", hint="ask for 1 prompt or more")
    library = _datasets_library()
    try:
        with _closed(iter(_open_rows(library, name_or_path, config=config, split=split))) as rows:
            first = next(rows, None)
            chosen = column or "prompt"
            if first is not None:
                chosen = column_of(f"data set {name_or_path}", list(first), column)
            cells = _cells(itertools.chain([] if first is None else [first], rows), name_or_path, chosen)
            prompts = tuple(itertools.islice(cells, limit))
    except (library.exceptions.DatasetsError, OSError, ValueError, KeyError, RuntimeError) as error:
        # pyarrow's word for a table without rows
        why = "it has no rows" if "BatchSize must be greater than 0" in str(error) else first_line(error)
        raise InputError(
            f"data set {name_or_path}: can't be read: {why}",
            hint="check the name, config and split, or give a local .json, .jsonl, .csv or .parquet file",
            where=name_or_path,
        ) from error
    if not prompts:
        raise InputError(
            f"data set {name_or_path}: column {chosen!r} holds no prompt",
            hint="name another column, config or split",
            where=name_or_path,
        )
    return ColumnPrompts(prompts, chosen)


@contextmanager
def _closed(rows: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Rows that are let go of at the end. Readers of Parquet that are left half read have to be gone before Python
    ends, or their threads end the process by a signal (apache/arrow issue 45214); they are in a cycle."""
    try:
        yield rows
    finally:
        if isinstance(rows, Generator):
            rows.close()
        gc.collect()


def choose_prompts(
    texts: Sequence[str], *, samples: int, seed: int, observe: Observer = ignore_events
) -> tuple[str, ...]:
    """`samples` of the texts in a seeded order. If there are fewer: all, in their own order, and a warning event."""
    if samples < 1:
        raise UsageError(f"samples is {samples}", hint="calibrate with 1 prompt or more")
    if len(texts) < samples:
        observe(
            Event(
                "warning",
                "calibrate",
                detail=f"{counted(len(texts), 'prompt')} found, fewer than the {samples} requested (--samples)",
            )
        )
    if len(texts) <= samples:
        return tuple(texts)
    # Sorting by digest is a shuffle that no Python version changes
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    return tuple(texts[i] for i in order[:samples])


def prompts_digest(prompts: Iterable[str]) -> str:
    """sha256 over the prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        data = prompt.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _datasets_library() -> Any:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise EnvironmentLacksError(
            "prompts from a data set need the `datasets` library",
            hint="pip install datasets, or give a text file with one prompt per line",
        ) from error
    return datasets


def _open_rows(library: Any, name_or_path: str, *, config: str | None, split: str | None) -> Iterable[Any]:
    path = user_path(name_or_path)
    if path.suffix.lower() == ".parquet":
        if not path.is_file():
            raise InputError(
                f"{path}: no such data set file", hint="check the path of the data set", where=name_or_path
            )
        return library.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    if (path / _SAVED_TO_DISK).is_file():
        return library.load_from_disk(str(path)).to_iterable_dataset()
    source = str(path) if path.is_dir() else name_or_path
    found = library.load_dataset(source, config, split=split, streaming=True)
    return found if split is not None else _only_split(found, name_or_path)


def _only_split(splits: Mapping[str, Iterable[Any]], name_or_path: str) -> Iterable[Any]:
    names = list(splits)
    if "train" in names or len(names) == 1:
        return splits["train" if "train" in names else names[0]]
    raise InputError(
        f"data set {name_or_path}: which split?",
        hint=f"set split to one of {', '.join(names)}",
        where=name_or_path,
    )


def _cells(rows: Iterable[Any], name_or_path: str, column: str) -> Iterable[str]:
    for row in rows:
        cell = row.get(column)
        if cell is None:
            continue
        prompt = text_of(cell)
        if prompt is None:
            raise InputError(
                f"data set {name_or_path}: column {column!r} holds {type(cell).__name__}, not text",
                hint=f"set column to one that holds text; the columns are {', '.join(row)}",
                where=name_or_path,
            )
        if prompt.strip():
            yield prompt.strip()
