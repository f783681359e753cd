"""Where bytes buy most: a rank for every low-rank branch, and layers that are better left at 16 bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store the layers of a branch."""

    rank: int | None  # None: they stay at 16 bit
    bytes: int
    error: float  # noise over signal of the layers' outputs, summed over them


@dataclass(frozen=True, slots=True)
class Candidate:
    """Layers that share a low-rank branch, or a single one, with what can become of them, cheapest first."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]


def allocate(candidates: Sequence[Candidate], budget: int) -> list[Choice]:
    """One choice for each candidate, together within `budget` bytes, with the least sum of errors that greed finds.

    Greedy by error per byte, over all steps up from the choice there is (not only to the next one, so that a rank which
    brings little does not hide one that brings much). Starts from the cheapest choices, which may exceed the budget.
    """
    taken = [min(candidate.choices, key=lambda choice: choice.bytes) for candidate in candidates]
    left = budget - sum(choice.bytes for choice in taken)
    while True:
        steps = [
            ((now.error - choice.error) / (choice.bytes - now.bytes), index, choice)
            for index, (candidate, now) in enumerate(zip(candidates, taken, strict=True))
            for choice in candidate.choices
            if now.bytes < choice.bytes <= now.bytes + left and choice.error < now.error
        ]
        if not steps:
            return taken
        _, index, choice = max(steps, key=lambda step: step[0])
        left -= choice.bytes - taken[index].bytes
        taken[index] = choice


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
        )
        for candidate in candidates
    ]
