"""What a bench measures: settings, one linear a case, and random layers for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.bench.shapes import LinearShape
from svdq_cli.bench.timing import bytes_per_microsecond
from svdq_cli.errors import UsageError
from svdq_cli.records import (
    LayerPlan,
    LayerSolution,
    Linear,
    Precision,
    SharedInput,
    SolveSettings,
    W4A4Plan,
    W4A16Plan,
    following_seed,
)
from svdq_cli.solve.linear import LinearWeights, solve_input

SECONDS_PER_ROW = 0.2


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How to measure. Raises UsageError for what can't be measured."""

    device: torch.device
    m: int | None = None  # rows of the W4A4 layers; None: as the shapes or the device say
    seconds_per_row: float = SECONDS_PER_ROW
    seed: int = 0

    @property
    def bytes_per_us(self) -> float:
        """The device's speed of copying, read and written bytes counted."""
        return bytes_per_microsecond(self.device)

    def __post_init__(self) -> None:
        if self.m is not None and self.m < 1:
            raise UsageError(f"--m {self.m}: a layer needs at least one row", hint="give a positive number")
        if not (math.isfinite(self.seconds_per_row) and self.seconds_per_row > 0):
            raise UsageError(
                f"--seconds {self.seconds_per_row:g}: not a valid time to measure",
                hint="give a positive number of seconds for each row, such as 0.2",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One layer to measure in several ways. The solutions are made when its turn comes."""

    linear: Linear
    m: int
    solve: Callable[[], Iterable[LayerSolution]]


def plans_of(
    linear: Linear, shape: LinearShape, precisions: Sequence[Precision], rank: int
) -> tuple[LayerPlan, ...]:
    """A linear in every precision that its role has."""
    match shape.role:
        case "w4a4":
            return tuple(W4A4Plan(linear, precision, rank) for precision in precisions)
        case "w4a16":
            return (W4A16Plan(linear),)


def solve_random(plans: Sequence[LayerPlan], settings: BenchSettings) -> Iterator[LayerSolution]:
    """Random layers, solved without calibration, one after the other."""
    solve = SolveSettings("none", settings.seed, torch.bfloat16)
    for plan in plans:
        weight = random_weight(settings, plan.linear)
        shared = SharedInput(plan.name, (plan.name,), ((plan.name,),))
        solved = solve_input(shared, {plan.name: plan}, {plan.name: LinearWeights(weight, None)}, None, solve)
        yield from solved.solutions


def random_weight(settings: BenchSettings, linear: Linear) -> Tensor:
    """(N, K) float32, so scaled that a result is as large as its input."""
    drawn = random_numbers(settings.seed + 1, linear.out_features, linear.in_features)
    return (drawn / linear.in_features**0.5).to(settings.device)


def random_numbers(seed: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32, standard normal, made on the CPU so that every device gets the same numbers."""
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(following_seed(seed, 0)), dtype=torch.float32
    )
