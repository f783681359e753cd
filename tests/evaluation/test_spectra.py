"""Singular values of weights, smoothed weights and residuals."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.evaluation.spectra import LEADING, spectra_of

N, K, R = 24, 40, 4


def layer():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=draw)
    smooth = torch.rand(K, generator=draw) + 0.5
    u, s, v = torch.linalg.svd(weight * smooth, full_matrices=False)
    return weight, smooth, (u[:, :R] * s[:R]) @ v[:R] / smooth


@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_those_of_a_full_svd(transposed: bool):
    weight, smooth, branch = layer()
    if transposed:
        weight, branch, smooth = weight.T, branch.T, torch.rand(N) + 0.5
    found = spectra_of(weight, smooth, branch)
    for values, matrix, norm in (
        (found.weight, weight, weight.norm()),
        (found.smoothed, weight * smooth, (weight * smooth).norm()),
        (found.residual, (weight - branch) * smooth, (weight * smooth).norm()),
    ):
        # float32 products before the float64 eigenvalues
        torch.testing.assert_close(
            values, torch.linalg.svdvals(matrix.double()) / norm.double(), rtol=1e-4, atol=1e-6
        )
    assert found.exact


def test_a_truncated_svd_leaves_the_tail():
    found = spectra_of(*layer())
    torch.testing.assert_close(found.residual[: N - R], found.smoothed[R:], rtol=1e-4, atol=1e-6)
    assert found.left_over == pytest.approx(float(found.smoothed[R:].norm()), rel=1e-4)


def test_large_matrices_get_a_randomized_svd_that_repeats_and_leaves_the_random_state_alone():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 500, generator=draw)
    smooth = torch.ones(500)
    state = torch.get_rng_state()
    found, again = (spectra_of(weight, smooth, torch.zeros_like(weight), exact_side=300) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.weight, again.weight)
    assert not found.exact
    assert len(found.weight) == LEADING
    exact = torch.linalg.svdvals(weight)[:LEADING].double() / weight.norm()
    # a flat spectrum is the hardest case: four power iterations are good to 2 % there
    torch.testing.assert_close(found.weight, exact, rtol=0.05, atol=0)


def test_a_weight_of_zeros_has_a_spectrum_of_zeros():
    found = spectra_of(torch.zeros(N, K), torch.ones(K), torch.zeros(N, K))
    assert found.left_over == 0
    assert not found.residual.any()
