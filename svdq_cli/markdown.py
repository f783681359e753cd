"""Markdown tables whose cells hold text from elsewhere: names and messages can't break out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from svdq_cli.printable import printable


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """The lines of a table."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for row in rows:
        yield "| " + " | ".join(cell(value) for value in row) + " |"


def cell(value: object) -> str:
    """Text on one line that is no markup. None is empty."""
    text = printable(str("" if value is None else value)).replace("\n", " ").replace("\t", " ")
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(mark, written)
    for mark in "*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text


def number(value: object) -> str:
    """Four digits of a figure; a count as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
