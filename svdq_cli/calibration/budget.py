"""How much of each input a calibration can keep within a number of bytes: rows, and the covariance of more tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from svdq_cli.calibration.covariance import covariance_bytes
from svdq_cli.errors import UsageError

# Below this the search has nothing to learn from and the rank of K x K moments is far below K.
LEAST_ROWS = 256
# Tokens that a covariance is taken over, for each channel. More than that hardly changes what GPTQ makes of it.
TOKENS_PER_CHANNEL = 4
MOST_TOKENS = 16384  # they are on the disk until all batches are there


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


def covariance_tokens(widths: Sequence[int], used: Sequence[bool], *, rows: int, budget: int) -> list[int]:
    """Over how many tokens the covariance of each input is taken; 0 where it is not `used`, where its rows are as many,
    and where what `rows` rows of every input leave of `budget` bytes is not enough. The narrowest inputs come first:
    theirs take the least.

    `widths`: K of each shared input.
    """
    left = budget - statistics_bytes(widths, rows=rows)
    found = [0] * len(widths)
    for index in sorted(range(len(widths)), key=widths.__getitem__):
        wanted = min(TOKENS_PER_CHANNEL * widths[index], MOST_TOKENS)
        needed = covariance_bytes(widths[index])
        if used[index] and wanted > rows and needed <= left:
            found[index] = wanted
            left -= needed
    return found


def statistics_bytes(widths: Iterable[int], *, rows: int) -> int:
    """What the statistics of all inputs take with `rows` rows each (at most: an input may have fewer tokens), without
    covariances."""
    each = list(widths)
    return rows_bytes(each, [rows] * len(each))


def rows_bytes(widths: Sequence[int], rows: Sequence[int]) -> int:
    """What the statistics of all inputs take, with as many rows of each as `rows` says, without covariances."""
    return _moments(sum(widths)) + sum(2 * width * count for width, count in zip(widths, rows, strict=True))


def covariances_bytes(widths: Sequence[int], tokens: Sequence[int]) -> int:
    """What the covariances of inputs take in the artefact; `tokens` is of `covariance_tokens`."""
    return sum(covariance_bytes(width) for width, count in zip(widths, tokens, strict=True) if count)


def covariance_rows_bytes(widths: Sequence[int], tokens: Sequence[int]) -> int:
    """What the tokens take of which they are made, in the files of batches."""
    return sum(2 * width * count for width, count in zip(widths, tokens, strict=True))


def _moments(total: int) -> int:
    """abs_max and second_moment, float32."""
    return 8 * total
