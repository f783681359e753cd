"""Where bytes buy most: a rank for every low-rank branch, and layers that are better left at 16 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BALANCE = 16.0  # the layers' mean SQNR counts nearly alone
_TINY = 1e-9  # noise over signal of what has none: a layer at 16 bits


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store the layers of a branch."""

    rank: int | None  # of rotated layers, the bits of their activations; None: they stay at 16 bits
    bytes: int
    errors: tuple[float, ...]  # noise over signal of each layer's output


@dataclass(frozen=True, slots=True)
class Candidate:
    """Layers that share a low-rank branch, or a single one, with what can become of them."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]
    gains: tuple[float, ...]  # noise over signal of the model's output for a layer whose own is 1

    def output_error(self, choice: Choice) -> float:
        """Noise over signal that the choice causes at the model's output."""
        return sum(gain * error for gain, error in zip(self.gains, choice.errors, strict=True))


def output_error(candidates: Sequence[Candidate], choices: Sequence[Choice]) -> float:
    """Noise over signal at the model's output, as if the layers' noises were independent."""
    return sum(each.output_error(choice) for each, choice in zip(candidates, choices, strict=True))


def mean_log_error(choices: Sequence[Choice]) -> float:
    """Mean natural logarithm of the layers' noise over signal: the negative of their mean SQNR, in another unit."""
    errors = [error for choice in choices for error in choice.errors]
    return sum(_log(error) for error in errors) / len(errors)


def allocate(candidates: Sequence[Candidate], budget: int, *, balance: float = 0.0) -> list[Choice]:
    """One choice for each candidate, together within `budget` bytes.

    Minimizes log(noise over signal of the model's output) + `balance` * mean log(noise over signal of the layers) as
    far as greed gets: by gain per byte, over all steps up from the choice there is (not only to the next one, so that a
    rank which brings little does not hide one that brings much). Starts from the cheapest choices, which may exceed
    the budget.
    """
    choices = [choice for candidate in candidates for choice in candidate.choices]
    owner = torch.tensor(
        [i for i, candidate in enumerate(candidates) for _ in candidate.choices], dtype=torch.int64
    )
    size = torch.tensor([choice.bytes for choice in choices], dtype=torch.float64)
    error = torch.tensor(
        [candidate.output_error(choice) for candidate in candidates for choice in candidate.choices],
        dtype=torch.float64,
    )
    logs = torch.tensor([sum(map(_log, choice.errors)) for choice in choices], dtype=torch.float64)
    logs = balance / sum(len(candidate.layers) for candidate in candidates) * logs
    taken = torch.stack([_cheapest(size, owner == index) for index in range(len(candidates))])
    left = budget - float(size[taken].sum())
    while True:
        now = taken[owner]
        total = error[taken].sum()
        reached = total - error[now] + error
        gain = torch.log(total.clamp(min=_TINY) / reached.clamp(min=_TINY)) + logs[now] - logs
        extra = size - size[now]
        worth = torch.where((extra > 0) & (extra <= left) & (gain > 0), gain / extra, -1.0)
        step = int(worth.argmax())
        if worth[step] < 0:
            return [choices[index] for index in taken.tolist()]
        left -= float(extra[step])
        taken[owner[step]] = step


def _cheapest(size: Tensor, own: Tensor) -> Tensor:
    """Index of the cheapest of the choices in the mask `own`."""
    return torch.where(own, size, torch.inf).argmin()


def allocate_against(candidates: Sequence[Candidate], budget: int, rival: Sequence[Choice]) -> list[Choice]:
    """The allocation with the least error at the model's output of those whose layers' mean SQNR is not below the
    `rival`'s, and the rival itself where none is better. Looks for the smallest balance that does it, by bisection."""
    best, least = list(rival), output_error(candidates, rival)
    low, high = 0.0, MOST_BALANCE
    for balance in (low, high):
        found = allocate(candidates, budget, balance=balance)
        if mean_log_error(found) <= mean_log_error(rival) and output_error(candidates, found) < least:
            best, least = found, output_error(candidates, found)
            high = balance
    while high - low > 0.01:
        middle = (low + high) / 2
        found = allocate(candidates, budget, balance=middle)
        if mean_log_error(found) > mean_log_error(rival):
            low = middle
            continue
        high = middle
        if (error := output_error(candidates, found)) < least:
            best, least = found, error
    return best


def uniform(candidates: Sequence[Candidate], rank: int, *, otherwise: bool) -> list[Candidate]:
    """The candidates with one rank for all; `otherwise`: 16 bit remains a choice."""
    return [
        Candidate(
            candidate.layers,
            tuple(
                choice
                for choice in candidate.choices
                if choice.rank == rank or (otherwise and choice.rank is None)
            ),
            candidate.gains,
        )
        for candidate in candidates
    ]


def _log(error: float) -> float:
    return math.log(max(error, _TINY))
