"""Which row of a stacked matrix each row of a stored one is."""

from __future__ import annotations

from svdq_cli.families.layouts.layout import HalvesSwapped, Interleaved, KeysAndValuesByHead, RowOrder


def row_sources(order: RowOrder, rows: int) -> list[int] | None:
    """The stacked row of each stored row; None where none moves. ValueError where the rows do not divide."""
    match order:
        case Interleaved(parts=parts) if parts > 1:
            size = _divided(rows, parts)
            return [part * size + row for row in range(size) for part in range(parts)]
        case HalvesSwapped():
            half = _divided(rows, 2)
            return [*range(half, rows), *range(half)]
        case KeysAndValuesByHead(width=width):
            size = _divided(rows, 3)
            heads = range(0, size, width) if size % width == 0 else None
            if heads is None:
                raise ValueError(f"{size} keys do not divide into heads of {width}")
            pairs = (
                start + offset + row for offset in heads for start in (size, 2 * size) for row in range(width)
            )
            return [*range(size), *pairs]
        case _:
            return None


def _divided(rows: int, parts: int) -> int:
    if rows % parts:
        raise ValueError(f"{rows} rows do not divide into {parts} parts")
    return rows // parts
