"""When a training run ends: after a wall-clock budget or a number of steps, whichever the run was given."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seconds:
    """Train for this long, earlier runs of the same work folder included."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Train for this many steps: the reproducible choice."""

    steps: int


Budget = Seconds | Steps


@dataclass(slots=True)
class Clock:
    """How far a run has come. `spent` counts earlier runs of the same work folder."""

    step: int = 0
    spent: float = 0.0  # seconds before this run
    started: float = 0.0

    def start(self) -> None:
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started


def share_done(clock: Clock, budget: Budget) -> float:
    """0 at the start, 1 when the budget is spent."""
    match budget:
        case Seconds(seconds):
            return min(1.0, clock.seconds / seconds)
        case Steps(steps):
            return min(1.0, clock.step / steps)


def learning_rate(share: float, step: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine that reaches 0 with the budget."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * share))
