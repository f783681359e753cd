"""How many rows of each input a calibration can keep within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable

from svdq_cli.errors import UsageError

# Below this the search has nothing to learn from and the rank of K x K moments is far below K.
LEAST_ROWS = 256


def rows_within(widths: Iterable[int], *, rows: int, budget: int) -> int:
    """The number of rows to keep of every input: `rows`, or fewer where they would take more than `budget` bytes.

    `widths`: K of each shared input. Raises UsageError for a budget that holds less than LEAST_ROWS.
    """
    total = sum(widths)
    fitting = (budget - _moments(total)) // (2 * total)
    if fitting < min(rows, LEAST_ROWS):
        raise UsageError(
            f"calibration.size_budget {budget / 1e9:.3f} GB holds {max(fitting, 0)} rows of each input",
            hint=f"give {statistics_bytes([total], rows=LEAST_ROWS) / 1e9:.3f} GB or more",
            where="calibration.size_budget",
        )
    return min(rows, fitting)


def statistics_bytes(widths: Iterable[int], *, rows: int) -> int:
    """What the statistics of all inputs take with `rows` rows each (at most: an input may have fewer tokens)."""
    total = sum(widths)
    return _moments(total) + 2 * total * rows


def _moments(total: int) -> int:
    """abs_max and second_moment, float32."""
    return 8 * total
