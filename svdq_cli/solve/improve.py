"""Steps beyond the paper's search: better images from the same bytes.

Learned smoothing, GPTQ rounding, a refitted branch. Every step is judged on rows that it did not see; a step that does
not pay is not taken, so the result is never worse there than the search it starts from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from svdq_cli.records import HELD_OUT, SearchStep
from svdq_cli.solve.forward import relative_errors
from svdq_cli.solve.steps import STEPS, Attempt, LayerGroup, Solutions
from svdq_cli.system.threads import end_if_left

LEAST_ROWS = 64  # with fewer there is nothing to learn from and nothing to judge on


@dataclass(frozen=True, slots=True)
class StepResults:
    """What the steps brought, in the order in which they were tried."""

    # layer -> step -> held-out noise over signal
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # step -> for all layers of the input
    taken: list[SearchStep] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)  # why steps were left out, in words


def improve(
    layer_group: LayerGroup,
    start: Solutions,
    *,
    steps: Sequence[SearchStep],
    place: Callable[[Tensor], Tensor],
    round_to_nearest: Callable[[Tensor], Solutions],
) -> tuple[Solutions, StepResults]:
    """Better solutions than `start`, and what each of `steps` brought.

    `place(s)` brings a smoothing factor to its stored form (range, size, 16 bits); `round_to_nearest(s)` solves for one
    with rounding to nearest.
    """
    step_results = StepResults({plan.name: {} for plan in layer_group.plans})
    if layer_group.rows.shape[0] < LEAST_ROWS:
        step_results.fallback.append(
            f"{layer_group.rows.shape[0]} calibration rows, but {LEAST_ROWS} are needed to learn and to validate"
        )
        return start, step_results
    train, judge = layer_group.rows.tensor_split([layer_group.rows.shape[0] * (HELD_OUT - 1) // HELD_OUT])

    def judged(solutions: Solutions) -> dict[str, float]:
        return relative_errors(judge, solutions, layer_group.weights, layer_group.mean)

    def note(step: str, errors: Mapping[str, float]) -> float:
        for name, error in errors.items():
            step_results.errors[name][step] = error
        return sum(errors.values())

    best, least = start, note("start", judged(start))
    for step in steps:
        run = STEPS[step].run
        if run is None:
            continue
        end_if_left()
        began = time.monotonic()
        tried = run(Attempt(layer_group, train, best, steps, place, round_to_nearest))
        if tried is None:
            step_results.fallback.append(f"{step}: no usable activations")
        elif (reached := note(step, judged(tried))) < least:
            best, least = tried, reached
            step_results.taken.append(step)
        step_results.seconds[step] = time.monotonic() - began
    return best, step_results
