"""Figures as people read them."""

from __future__ import annotations


def bytes_text(count: int) -> str:
    """In decimal units, as disks and downloads are sold: 6790000000 is "6.79 GB"."""
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
