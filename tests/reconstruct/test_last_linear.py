"""The model's last linear, fitted to what the 4-bit blocks hand over: to sums over the steps, where that pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svdq_cli.conversion.record import Sample, record_blocks
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, default_recipe
from svdq_cli.reconstruct.block_graph import block_graph_of, rearranged_rows
from svdq_cli.reconstruct.calls import Call
from svdq_cli.reconstruct.hidden_states import HiddenStates
from svdq_cli.reconstruct.last_linear import Moments, fitted, moments_of
from svdq_cli.reconstruct.tensor_cache import TensorCache
from svdq_cli.records import ignore_events
from tests.tiny_families import tiny_pipeline

CPU = RunOptions(device="cpu")
STEPS, TOKENS = 8, 400


def trajectory(seed: int, wrong: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the steps of inputs, of outputs that are `wrong` (K + 1, N) per input and step, and of exact ones."""
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(STEPS, TOKENS, len(wrong) - 1, generator=made)
    exact = torch.randn(STEPS, TOKENS, wrong.shape[1], generator=made)
    found = exact + inputs @ wrong[:-1] + wrong[-1] + noise * torch.randn(exact.shape, generator=made)
    return inputs.sum(0), found.sum(0), exact.sum(0)


def moments(seeds: range, wrong: Tensor, noise: float) -> Moments:
    first, *others = [moments_of(*trajectory(seed, wrong, noise), constant=float(STEPS)) for seed in seeds]
    for each in others:
        first = first + each
    return first


def test_what_outputs_are_off_by_in_proportion_to_the_inputs_is_taken_back():
    wrong = 0.1 * torch.randn(13, 4, generator=torch.Generator().manual_seed(0))
    change, search = fitted(moments(range(6), wrong, 0.02), moments(range(6, 8), wrong, 0.02))
    assert change is not None
    assert search.ridge == 0.1  # the smallest there is: there are rows in plenty
    assert search.after < 0.05 * search.before
    # the last input, of size STEPS in a sum, stands for what is added in every step
    found = torch.cat([change[:-1], change[-1:]])
    assert float((found + wrong).norm() / wrong.norm()) < 0.15


def test_the_error_that_moments_foretell_is_the_error():
    wrong = 0.1 * torch.randn(13, 4, generator=torch.Generator().manual_seed(0))
    held_out = trajectory(9, wrong, 0.5)
    change, _ = fitted(moments(range(6), wrong, 0.5), moments(range(6, 8), wrong, 0.5))
    assert change is not None
    inputs, found, exact = held_out
    ones = torch.full((TOKENS, 1), float(STEPS))
    left = found.double() + torch.cat([inputs, ones], 1).double() @ change - exact.double()
    told = moments_of(*held_out, constant=float(STEPS)).left(change)
    assert told == pytest.approx(float(left.square().sum() / exact.double().square().sum()), rel=1e-6)


def test_noise_is_not_fitted():
    """Held-out trajectories tell: what is fitted to chance makes them worse."""
    nothing = torch.zeros(40, 4)
    change, search = fitted(moments(range(1), nothing, 3.0), moments(range(1, 2), nothing, 3.0))
    assert change is None
    assert (search.after, search.ridge) == (search.before, None)


def test_a_fit_needs_trajectories_to_learn_from_and_to_judge_on():
    some = moments(range(2), 0.1 * torch.ones(5, 3), 0.0)
    assert fitted(some, None)[0] is None
    assert fitted(None, some)[0] is None


class Ends(nn.Module):
    """A model of one block, with an end of its own."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.blocks, self.end = nn.ModuleList([nn.Linear(8, 8)]), end
        self.last = nn.Linear(8, 6)
        self.behind = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.blocks[0](x).relu())
        if self.end == "rearranged":
            return y[:, :9].reshape(1, 3, 3, 6).permute(0, 3, 1, 2) * -2
        if self.end == "twice":
            return y + self.last(x)
        if self.end == "squared":
            return y.square()
        return self.behind(y[:, :9].reshape(1, 3, 3, 6).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("end", "last"), [("rearranged", "last"), ("twice", None), ("squared", None), ("behind", None)]
)
def test_the_last_linear_is_the_one_whose_outputs_are_the_models(end: str, last: str | None):
    model = Ends(end).requires_grad_(False)
    found = block_graph_of(model, ["blocks.0"], Call((torch.randn(1, 12, 8),), {}))
    assert found.last_linear == last
    assert found.needs("blocks.0", after=0) == (last is not None)


def test_rows_that_the_model_throws_away_are_told():
    returned = torch.randn(1, 12, 6, requires_grad=True)
    found = rearranged_rows([returned[:, :9].flatten() * -2], returned)
    assert found is not None
    assert (found[0].tolist(), found[1]) == ([True] * 9 + [False] * 3, -2)


def test_what_the_last_linear_returned_is_told_from_what_the_model_did(tmp_path: Path):
    model, x = Ends("rearranged").requires_grad_(False), torch.randn(1, 12, 8)
    call = Call((x,), {}, (model(x),))
    graph = block_graph_of(model, ["blocks.0"], call)
    states = HiddenStates(model, graph, [call], TensorCache(tmp_path, host_bytes=1 << 20))
    elsewhere = torch.randn(1, 12, 8)
    states.keep("blocks.0", 0, elsewhere)
    found = states.at_the_end("last", 0, torch.device("cpu"))
    assert found is not None
    given, returned, recorded = found
    torch.testing.assert_close(given, elsewhere[0, :9].relu())
    torch.testing.assert_close(returned, model.last(given))
    torch.testing.assert_close(recorded, model.last(model.blocks[0](x).relu())[0, :9])


@pytest.mark.parametrize(
    ("family", "last"),
    [("pixart", "proj_out"), ("z-image", "all_final_layer.2-1.linear"), ("sd15", None)],
)
def test_families_end_in_a_linear_that_is_kept_or_in_none(family: str, last: str | None, tmp_path: Path):
    folder = tiny_pipeline(family, tmp_path)
    wanted = {"prompts": "a cat", "samples": 1, "steps": 2, "height": 32, "width": 32, "rows": 64}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    recipe = default_recipe(
        str(folder), calibration=Calibration.model_validate({**wanted, "prompts": str(prompts)})
    )
    prepared = prepare(recipe)
    sampling = sampling_for(recipe, prepared.source)
    recordings = record_blocks(
        prepared, sampling, Sample(1, 1, 2), options=CPU, device=torch.device("cpu"), observe=ignore_events
    )
    (recording,) = recordings.values()
    assert recording.block_graph.last_linear == last
    assert last is None or last in {linear.name for linear in prepared.plan.kept}
