"""With about as many rows as channels, or fewer, no step fits chance."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from svdq_cli.records import (
    ActivationStats,
    Int4,
    Linear,
    NvFp4,
    Precision,
    SearchStep,
    SharedInput,
    SolveSettings,
    W4A4Plan,
)
from svdq_cli.solve.forward import LinearWeights, output_sqnr_db
from svdq_cli.solve.linear import solve_input
from svdq_cli.solve.second_moments import second_moments, shrinkage

K, N = 512, 256
STEPS: tuple[SearchStep, ...] = ("refine", "gptq", "scales", "refit")


def inputs(kind: str, rows: int, seed: int) -> Tensor:
    """White noise, or directions of a few ranks over it; one channel in 64 is larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator)
    if kind == "low rank":
        rank = K // 16
        directions = torch.randn(rank, K, generator=torch.Generator().manual_seed(5)) * 3 / rank**0.5
        x = x + torch.randn(rows, rank, generator=generator) @ directions
    x[:, ::64] *= 12
    return x


def held_out_db(
    kind: str, rows: int, precision: Precision, steps: tuple[SearchStep, ...]
) -> tuple[float, list[float]]:
    """(SQNR on rows that the solve did not see, that of every step on the rows that judge)."""
    x = inputs(kind, rows, 0)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * K**-0.5
    plan = W4A4Plan(Linear("l", K, N, bias=False), precision, 16)
    stats = ActivationStats("l", x.abs().amax(0), x.square().mean(0), x.bfloat16(), tokens_seen=rows)
    solved = solve_input(
        SharedInput("l", ("l",), (("l",),)),
        {"l": plan},
        {"l": LinearWeights(weight, None)},
        stats,
        SolveSettings("closed-form", 0, torch.bfloat16, steps),
    )
    found = output_sqnr_db(inputs(kind, 2048, 7), weight, solved.w4a4[0])
    return found, list(solved.reports[0].search.steps_db.values())


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=["int4", "nvfp4"])
@pytest.mark.parametrize(
    ("kind", "rows"), [("white", 600), ("white", 300), ("low rank", 600), ("low rank", 300)]
)
def test_no_step_makes_held_out_error_worse(kind: str, rows: int, precision: Precision):
    before, _ = held_out_db(kind, rows, precision, ())
    after, steps = held_out_db(kind, rows, precision, STEPS)
    noise = 0.1  # dB: a step that gains nothing on 75 or 37 rows is as often below as above
    assert all(later > earlier - noise for earlier, later in itertools.pairwise(steps)), steps
    assert after > before + (1.0 if kind == "low rank" else 0.0)


@pytest.mark.parametrize(
    ("kind", "rows", "least", "most"), [("white", 600, 0.9, 1.0), ("low rank", 8192, 0.0, 0.05)]
)
def test_what_is_chance_is_told_from_what_is_not(kind: str, rows: int, least: float, most: float):
    x = inputs(kind, rows, 0)
    assert least <= shrinkage(x, x.T @ x / rows) <= most


def test_the_channels_own_moments_stay_as_they_are():
    x = inputs("white", 100, 0)
    torch.testing.assert_close(second_moments(x).diagonal(), x.square().mean(0))
