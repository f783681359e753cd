"""Effort `best`: blocks are tuned where they run, keep what the formats can store, and never get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svdq_cli.preparing import prepare
from svdq_cli.recipe import default_recipe
from svdq_cli.reconstruct import reconstruct, record_calls
from svdq_cli.reconstruct import run as tuning
from svdq_cli.reconstruct.run import blocks_of
from svdq_cli.reconstruct.tunable import frozen
from svdq_cli.records import LayerSolution, W4A4Solution
from svdq_cli.runtime.linear import w4a4_exact
from svdq_cli.solving import solve_model


@pytest.fixture(scope="module")
def solved(tiny_flux: Path):
    from diffusers import FluxTransformer2DModel

    prepared = prepare(default_recipe(str(tiny_flux)))
    solutions, _ = solve_model(prepared, None, torch.device("cpu"), lambda event: None)
    load = lambda: FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer").float()  # noqa: E731
    return prepared, solutions, load


def draw_of(model: torch.nn.Module, calls: int):
    """Calls of the transformer with random latents, as a pipeline makes them."""
    config: Any = model.config
    made = torch.Generator().manual_seed(1)

    def draw() -> None:
        for call in range(calls):
            with torch.no_grad():
                model(
                    hidden_states=torch.randn(1, 16, config.in_channels, generator=made),
                    encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim, generator=made),
                    pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=made),
                    timestep=torch.tensor([1 - call / calls]),
                    img_ids=torch.zeros(16, 3),
                    txt_ids=torch.zeros(8, 3),
                    guidance=torch.ones(1) if config.guidance_embeds else None,
                    return_dict=False,
                )

    return draw


def test_the_blocks_of_a_plan_are_its_repeated_modules(solved):
    prepared, _, _ = solved
    assert list(blocks_of(prepared.plan)) == ["transformer_blocks.0", "single_transformer_blocks.0"]


def test_tuned_blocks_lose_less_and_store_what_they_were_judged_with(solved, monkeypatch: pytest.MonkeyPatch):
    prepared, solutions, load = solved
    monkeypatch.setattr(tuning, "STEPS", 20)
    monkeypatch.setattr(tuning, "JUDGE_EVERY", 10)
    model = load()
    calls = record_calls(model, draw_of(model, 12), most=8)
    assert len(calls) == 8
    tuned, blocks = reconstruct(model, prepared.plan, solutions, calls, seed=0)
    assert tuned.keys() == solutions.keys()
    assert all(block.after <= block.before for block in blocks.values())
    assert any(block.after < 0.95 * block.before for block in blocks.values())
    for name, solution in tuned.items():
        before = solutions[name]
        assert solution.plan == before.plan
        assert torch.equal(solution.codes, before.codes)
        for field in ("smooth", "up", "down", "scales", "bias"):
            one, other = getattr(solution, field, None), getattr(before, field, None)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.dtype == other.dtype
                assert torch.isfinite(one.float()).all()
    for shared in prepared.plan.inputs:
        smooths = [s.smooth for n in shared.layers if isinstance(s := tuned[n], W4A4Solution)]
        assert all(torch.equal(smooths[0], other) for other in smooths)
        for part in shared.branches:
            downs = [s.down for n in part if isinstance(s := tuned[n], W4A4Solution)]
            assert all(torch.equal(downs[0], other) for other in downs)


def test_a_frozen_layer_computes_what_the_checkpoint_says(solved):
    _, solutions, _ = solved
    solution: LayerSolution = next(s for s in solutions.values() if isinstance(s, W4A4Solution))
    assert isinstance(solution, W4A4Solution)
    x = torch.randn(5, solution.plan.linear.in_features, generator=torch.Generator().manual_seed(2))
    x = x.bfloat16().float()
    found, exact = frozen(solution)(x), w4a4_exact(x, solution)
    # exp(log s) moves s by an ulp, which may turn a code at a rounding boundary
    assert float((found - exact).norm() / exact.norm()) < 2e-3
