"""Chance, measured: the start noise off by one rounding, and outputs at equal inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svdq_cli.evaluation.outputs import OutputCall, output_sqnr
from svdq_cli.evaluation.own_noise import SPACING_OF_16_BIT, nudged, nudged_start

CPU = torch.device("cpu")


def test_a_nudge_is_one_rounding_of_every_number():
    noise = torch.randn(1, 4, 8, 8)
    moved = nudged(noise)
    assert (moved > noise).all()
    assert torch.equal(torch.nextafter(moved, torch.full_like(moved, -float("inf"))), noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_16_bit_noise_only_some_numbers_are_moved(dtype: torch.dtype):
    noise = torch.randn(2, 16, 64, 64).to(dtype)
    changed = nudged(noise) != noise
    assert changed.sum() == noise.numel() // SPACING_OF_16_BIT
    before, after = noise.double(), nudged(noise).double()
    assert (after - before).norm() / before.norm() < 1e-3


@pytest.mark.parametrize("made", [lambda x: x, lambda x: (x, "ids"), lambda x: (x, None, None)])
def test_the_pipelines_start_noise_is_nudged_and_left_alone_afterwards(made: Any):
    noise = torch.zeros(3)
    pipe: Any = SimpleNamespace(prepare_latents=lambda *shape: made(noise))
    own = pipe.prepare_latents
    with nudged_start(pipe):
        found = pipe.prepare_latents(3)
    first = found[0] if isinstance(found, tuple) else found
    assert (first > 0).all()
    assert pipe.prepare_latents is own


class Off(nn.Module):
    """Adds the errors to its input, in turn."""

    def __init__(self, *errors: float) -> None:
        super().__init__()
        self.errors, self.calls = errors, 0

    def forward(self, x: Tensor, *, scale: float) -> tuple[Tensor]:
        self.calls += 1
        return (x * scale + self.errors[(self.calls - 1) % len(self.errors)],)


def calls(count: int) -> list[OutputCall]:
    x = torch.ones(2, 3)
    return [OutputCall("transformer", (x,), {"scale": 2.0}, 2 * x) for _ in range(count)]


def test_errors_that_cancel_over_the_steps_count_in_a_step_and_not_in_the_sum():
    found = output_sqnr({"transformer": Off(0.2, -0.2)}, calls(4), CPU, steps=4)
    assert found is not None
    assert found.step == pytest.approx(20, abs=1e-3)
    assert found.sum > 100


def test_errors_that_add_up_count_in_both():
    found = output_sqnr({"transformer": Off(0.2)}, calls(4), CPU, steps=4)
    assert found is not None
    assert (found.step, found.sum) == (pytest.approx(20, abs=1e-3), pytest.approx(20, abs=1e-3))


def test_two_calls_a_step_are_summed_each_by_itself():
    """Guidance calls the model with and without the prompt."""
    found = output_sqnr({"transformer": Off(0.2, -0.2)}, calls(8), CPU, steps=4)
    assert found is not None
    assert found.sum == pytest.approx(20, abs=1e-3)


def test_a_model_that_was_never_called_has_no_figure():
    assert output_sqnr({"transformer": Off(0.0)}, [], CPU, steps=4) is None
