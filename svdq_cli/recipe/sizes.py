"""Sizes as people write them: bytes, or a number with its unit."""

from __future__ import annotations

import re

SIZE_PATTERN = r"^\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*$"
SIZE_HINT = "write it like 6500000000, 6.5GB or 6GiB"


def bytes_of_size(size: int | str) -> int | None:
    """A size in bytes: GB are 10^9, GiB 2^30. None for what is no size above zero."""
    if isinstance(size, int):
        return size if size > 0 else None
    found = re.match(SIZE_PATTERN, size)
    if found is None:
        return None
    number, unit = found.groups()
    base = 1024 if unit and unit.endswith("i") else 1000
    return int(float(number) * base ** ("KMGT".index(unit[0].upper()) + 1 if unit else 0)) or None
