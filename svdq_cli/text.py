"""Text: sizes and times as people write and read them, what is safe to show, and cells of Markdown tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import PurePath
from typing import TypeVar


def bytes_text(count: int) -> str:
    """A size in decimal units: 6790000000 is "6.79 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def seconds_text(seconds: float) -> str:
    """Three digits, in the unit that suits: "0.042 s", "7.31 s", "12.5 min", "3.2 h"."""
    if seconds < 1:
        return f"{seconds:.3f} s"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def counted(count: int, what: str) -> str:
    """A number and its noun: "1 tensor", "3 tensors"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def bare_name(source: str) -> str:
    """What an output is named after: a model's name without its folders and the ending of a weight file."""
    name = PurePath(source).name
    stem, dot, ending = name.rpartition(".")
    return stem if dot and ending.lower() in ("safetensors", "gguf", "dduf") and stem else name


SIZE_PATTERN = r"^\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*$"
SIZE_HINT = "write it like 6500000000, 6.5GB or 6GiB"


def bytes_of_size(size: int | str) -> int | None:
    """A size in bytes: GB are 10^9, GiB 2^30. None for text that is not a size above zero."""
    if isinstance(size, int):
        return size if size > 0 else None
    found = re.match(SIZE_PATTERN, size)
    if found is None:
        return None
    number, unit = found.groups()
    base = 1024 if unit and unit.endswith("i") else 1000
    return int(float(number) * base ** ("KMGT".index(unit[0].upper()) + 1 if unit else 0)) or None


_UNSAFE = ("Cc", "Cs")  # control codes, and the halves of characters that represent bytes that are not UTF-8
# writing that reads backwards
_REVERSED = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
Record = TypeVar("Record")


def printable(text: str) -> str:
    """The text with its control characters, but line feeds and tabs, written as escapes."""
    if text.isprintable():
        return text
    return "".join(_escaped(mark) if mark in _REVERSED or _is_unsafe(mark) else mark for mark in text)


def printable_record(record: Record) -> Record:
    """A report with every text in it printable."""
    return _printable(record)  # type: ignore[return-value]


def _printable(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return tuple(_printable(item) for item in value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _printable(getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **own)
    return value


def _is_unsafe(mark: str) -> bool:
    return mark not in "\n\t" and unicodedata.category(mark) in _UNSAFE


def _escaped(mark: str) -> str:
    return mark.encode("unicode_escape", "surrogatepass").decode("ascii")


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """The lines of a table."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        yield "| " + " | ".join(cell(value) for value in row) + " |"


def cell(value: object) -> str:
    """Text on one line without markup. None is empty."""
    text = printable(str("" if value is None else value)).replace("\n", " ").replace("\t", " ")
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(mark, written)
    for mark in "*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text


def number(value: object) -> str:
    """Four digits of a figure; a count as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
