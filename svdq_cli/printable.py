"""Text from files and models, made safe to show: a tensor's name may hold what moves a terminal's cursor."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

_UNSAFE = ("Cc", "Cs")  # control codes, and the halves of characters that stand for bytes that are no UTF-8
_REVERSED = (
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # writing that reads backwards
)
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
