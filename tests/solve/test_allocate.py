"""Bytes go where they buy most."""

from __future__ import annotations

import itertools

import pytest
import torch

from svdq_cli.records import Int4, SolveSettings, W4A4Plan
from svdq_cli.solve.allocate import (
    Candidate,
    Choice,
    allocate,
    allocate_against,
    mean_log_error,
    output_error,
    uniform,
)
from svdq_cli.solve.ranks import rank_errors
from tests.solve.test_linear import SHARED, plans, stats_of, weights


def candidate(name: str, *choices: tuple[int | None, int, float], gain: float = 1.0) -> Candidate:
    made = tuple(Choice(rank, size, (error,)) for rank, size, error in choices)
    return Candidate((name,), made, (gain,))


STEEP = candidate("steep", (16, 10, 1.0), (32, 20, 0.2), (None, 100, 0.0))
FLAT = candidate("flat", (16, 10, 0.5), (32, 20, 0.45), (None, 100, 0.0))
LATE = candidate("late", (16, 10, 1.0), (32, 20, 0.99), (48, 30, 0.1))


def error_of(choices: list[Choice]) -> float:
    return sum(error for choice in choices for error in choice.errors)


@pytest.mark.parametrize("budget", [30, 40, 50, 60, 90, 130, 300])
def test_greed_is_near_the_best_there_is(budget: int):
    candidates = [STEEP, FLAT, LATE]
    found = allocate(candidates, budget)
    assert sum(choice.bytes for choice in found) <= budget
    within = [
        combination
        for combination in itertools.product(*(c.choices for c in candidates))
        if sum(choice.bytes for choice in combination) <= budget
    ]
    best = min(error_of(list(combination)) for combination in within)
    assert error_of(found) <= best + 0.3  # one step of the flattest kind may be taken too early


def test_a_rank_that_brings_little_does_not_hide_one_that_brings_much():
    assert [choice.rank for choice in allocate([LATE], 30)] == [48]


def test_a_layer_that_hardly_reaches_the_output_gets_what_is_left():
    loud = candidate("loud", (16, 10, 1.0), (32, 20, 0.8), gain=10.0)
    quiet = candidate("quiet", (16, 10, 1.0), (32, 20, 0.1), gain=0.01)
    assert [choice.rank for choice in allocate([loud, quiet], 30)] == [32, 16]
    assert [choice.rank for choice in allocate([loud, quiet], 30, balance=5.0)] == [16, 32]


def test_layers_do_not_lose_in_the_mean_against_one_rank_for_all():
    made = torch.Generator().manual_seed(0)
    draws = torch.rand(12, 3, generator=made).tolist()
    candidates = [
        candidate(
            str(i), *((16 * k, 10 * k, start * decay**k) for k in (1, 2, 3, 4)), gain=100 ** (gain - 0.5)
        )
        for i, (start, decay, gain) in enumerate(draws)
    ]
    same = [each.choices[1] for each in candidates]
    found = allocate_against(candidates, 240, same)
    assert sum(choice.bytes for choice in found) <= 240
    assert mean_log_error(found) <= mean_log_error(same)
    assert output_error(candidates, found) < output_error(candidates, same)
    free = allocate(candidates, 240)
    assert output_error(candidates, free) <= output_error(candidates, found)


def test_a_rival_that_nothing_beats_is_taken():
    alike = [candidate(str(i), (16, 10, 1.0), (32, 20, 0.5), (48, 30, 0.49)) for i in range(4)]
    same = [each.choices[1] for each in alike]
    assert allocate_against(alike, 80, same) == same


def test_one_rank_for_all_leaves_only_that_rank_and_16_bit():
    (only,) = uniform([STEEP], 32, otherwise=True)
    assert [choice.rank for choice in only.choices] == [32, None]
    (only,) = uniform([STEEP], 32, otherwise=False)
    assert [choice.rank for choice in only.choices] == [32]


def test_more_rank_leaves_less_error():
    settings = SolveSettings("grid", 0, torch.bfloat16)
    rows = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    found = rank_errors(
        SHARED,
        [p for p in plans(Int4()).values() if isinstance(p, W4A4Plan)],
        weights(),
        stats_of(rows),
        settings,
        (16, 48, 96),
    )
    assert [names for names, _ in found] == [("q", "k", "v"), ("mlp",)]
    for names, errors in found:
        for layer in range(len(names)):
            assert errors[16][layer] > errors[48][layer] > errors[96][layer] > 0
