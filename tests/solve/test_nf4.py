"""NF4: levels, scales in 8 bits, and rounding for what a layer reads."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.solve.nf4 import (
    LEVELS,
    about_levels,
    decode,
    nearest,
    nearest_codes,
    solve_for_rows,
    stored_scales,
)


def test_codes_are_of_the_nearest_level():
    levels = torch.tensor(LEVELS)
    values = torch.linspace(-1.2, 1.2, 500)
    wanted = (values[:, None] - levels).abs().argmin(1)
    assert torch.equal(nearest_codes(values).long(), wanted)
    assert torch.equal(decode(nearest_codes(levels)), levels)


def test_the_table_of_levels_differs_only_next_to_a_middle():
    values = torch.linspace(-1.2, 1.2, 10_001)
    exact, quick = decode(nearest_codes(values)), about_levels(values)
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    off = values[exact != quick]
    assert len(off) < 20
    assert bool(((off[:, None] - middles).abs().amin(1) <= 1 / 4096).all())


def test_scales_in_8_bits_keep_their_resolution_next_to_a_large_one():
    scales = torch.rand(1000) * 0.1 + 0.01
    scales[500] = 50.0
    # half a step of 13 octaves in 255
    assert float((stored_scales(scales).values / scales).log2().abs().max()) <= 13 / 255 / 2 + 1e-5


def test_rounding_for_rows_beats_nearest_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 192, generator=generator)

    def drawn(count: int) -> torch.Tensor:
        """Inputs of a few directions and a little noise, as hidden states are."""
        noise = torch.randn(count, 192, generator=generator)
        return torch.randn(count, 24, generator=generator) @ mix + 0.5 * noise

    rows, fresh = drawn(2000), drawn(500)
    weights = [torch.randn(n, 192, generator=generator) for n in (64, 32)]

    def error(solution: torch.Tensor, weight: torch.Tensor) -> float:
        return float((fresh @ (solution - weight).T).norm() / (fresh @ weight.T).norm())

    for weight, found in zip(weights, solve_for_rows(weights, rows), strict=True):
        assert error(found.weight, weight) < 0.6 * error(nearest(weight).weight, weight)


@pytest.mark.parametrize("weight", [torch.zeros(3, 64), torch.full((2, 128), 3e-20)], ids=["zeros", "tiny"])
def test_weights_next_to_nothing_come_back_finite(weight: torch.Tensor):
    for found in (nearest(weight), *solve_for_rows([weight], torch.randn(100, weight.shape[1]))):
        assert bool(torch.isfinite(found.weight).all())
        assert float((found.weight - weight).abs().max()) <= float(weight.abs().max()) / 5
