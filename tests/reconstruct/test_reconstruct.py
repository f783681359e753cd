"""The model run with gradients: it is tuned as a whole and never gets worse; layers weigh what they matter."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten

from svdq_cli.conversion.record import Sample, record_blocks
from svdq_cli.inference.load import load_beside
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Quantization, default_recipe
from svdq_cli.reconstruct import (
    Call,
    Reconstruction,
    Recording,
    TensorCache,
    block_graph_of,
    blocks_of,
    output_gains,
    record_trajectories,
    tune_model,
    tuning,
)
from svdq_cli.reconstruct.hidden_states import HiddenStates
from svdq_cli.reconstruct.objective import signals_of, trajectory_error
from svdq_cli.reconstruct.run import runnable
from svdq_cli.reconstruct.swap_modules import put
from svdq_cli.reconstruct.tunable import TunableBlock, frozen
from svdq_cli.reconstruct.tunable_model import TunableModel
from svdq_cli.records import LayerSolution, W4A4Solution, ignore_events
from svdq_cli.runtime.linear import w4a4_exact
from svdq_cli.system.offload import filled_copy
from tests.solving import solved_in
from tests.tiny_families import tiny_pipeline

CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module")
def solved(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory):
    from diffusers import FluxTransformer2DModel

    # Rounded once: branches and codes that were refined leave tuning nothing on weights as random as these.
    prepared = prepare(default_recipe(str(tiny_flux), quantization=Quantization(refinements=0)))
    solutions = solved_in(tmp_path_factory.mktemp("solved") / "work", prepared)
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


@pytest.fixture(scope="module")
def recorded(solved, tmp_path_factory: pytest.TempPathFactory):
    """Makes a job of the tiny model, with as much room for weights as is said."""
    prepared, solutions, load = solved
    model = load()
    trajectories = record_trajectories(model, [draw_of(model, 6)] * 3, steps=6, most=4)
    assert [len(each.calls) for each in trajectories] == [4, 4, 4]
    blocks = blocks_of(prepared.plan)
    block_graph = block_graph_of(model.requires_grad_(False), blocks, trajectories[0].calls[0])
    weights = model.state_dict()
    for block in blocks:
        model.get_submodule(block).to("meta")
    unused = TensorCache(tmp_path_factory.mktemp("unused"), host_bytes=0)
    recording = Recording(trajectories, block_graph)

    def made(room: int) -> Reconstruction:
        return Reconstruction(model, weights, prepared.plan, solutions, recording, unused, room)

    return made


@pytest.fixture(scope="module")
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "STEPS", 20)
        patch.setattr(tuning, "JUDGE_EVERY", 10)
        patch.setattr(tuning, "WARM_UP", 2)
        yield


@pytest.fixture(scope="module")
def tuned(recorded, few_steps):
    search, blocks = tune_model(recorded(0), seed=0)
    return search, dict(blocks)


def test_a_tuned_model_loses_less_on_images_that_it_was_not_tuned_on(tuned):
    search, _ = tuned
    assert 0 < search.after < 0.95 * search.before


def test_a_tuned_model_stores_what_it_was_judged_with(solved, recorded, tuned):
    """The error of the solutions, run as they are stored, is the one that was reported."""
    _, solutions, load = solved
    search, blocks = tuned
    found = {name: each for layers in blocks.values() for name, each in layers.items()}
    model = load().requires_grad_(False)
    put(model, {**runnable(solutions), **{name: frozen(each) for name, each in found.items()}})
    (*train, judge) = recorded(0).recording.trajectories
    signals = signals_of(call.outputs for each in (*train, judge) for call in each.calls)
    lost = [(model(*call.args, **call.kwargs)[0] - call.outputs[0],) for call in judge.calls]
    assert float(trajectory_error(lost, signals, judge.length)) == pytest.approx(search.after, rel=1e-3)


def test_tuning_keeps_codes_and_what_layers_share(solved, tuned):
    prepared, solutions, _ = solved
    _, blocks = tuned
    assert list(blocks) == list(blocks_of(prepared.plan))
    found = {name: each for layers in blocks.values() for name, each in layers.items()}
    assert found.keys() == {plan.name for plan in prepared.plan.w4a4}
    for name, solution in found.items():
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
        smooths = [found[name].smooth for name in shared.layers if name in found]
        assert all(torch.equal(smooths[0], other) for other in smooths)
        for part in shared.branches:
            downs = [found[name].down for name in part if name in found]
            assert all(torch.equal(downs[0], other) for other in downs)


def test_weights_that_stay_between_turns_change_no_bit(recorded, tuned, few_steps):
    search, blocks = tuned
    again, more = tune_model(recorded(10**9), seed=0)
    assert again == search
    for block, layers in more:
        for name, solution in layers.items():
            for field in ("smooth", "up", "down", "scales"):
                assert torch.equal(getattr(solution, field), getattr(blocks[block][name], field))


def test_a_model_that_tuning_does_not_better_stays(recorded, few_steps, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "LEARNING_RATE", 3.0)
    search, blocks = tune_model(recorded(0), seed=0)
    assert search.after == search.before
    assert list(blocks) == []


def test_gradients_through_a_model_that_runs_block_by_block_are_the_whole_models(solved, recorded):
    prepared, solutions, load = solved
    job = recorded(0)
    model, call = TunableModel(job), job.recording.calls[0]
    before = {name: id(module) for name, module in job.model.named_modules()}
    with model.running():
        torch.stack([part.square().sum() for part in model.errors(call)]).sum().backward()
    assert {name: id(module) for name, module in job.model.named_modules()} == before
    assert not any("forward" in vars(module) for module in job.model.modules())

    w4a4 = {name: each for name, each in solutions.items() if isinstance(each, W4A4Solution)}
    whole, tunable = load().requires_grad_(False), TunableBlock(prepared.plan.inputs, w4a4)
    put(whole, {**runnable(solutions), **tunable.layers})
    (whole(*call.args, **call.kwargs)[0] - call.outputs[0]).square().sum().backward()
    found, wanted = (
        sorted(float(each.grad.norm()) for each in parameters if each.grad is not None)
        for parameters in (model.parameters, tunable.parameters())
    )
    assert len(found) == len(model.parameters)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_frozen_layer_computes_what_the_checkpoint_says(solved):
    _, solutions, _ = solved
    solution: LayerSolution = next(s for s in solutions.values() if isinstance(s, W4A4Solution))
    assert isinstance(solution, W4A4Solution)
    x = torch.randn(5, solution.plan.linear.in_features, generator=torch.Generator().manual_seed(2))
    x = x.bfloat16().float()
    found, exact = frozen(solution)(x), w4a4_exact(x, solution)
    # exp(log s) moves s by an ulp, which may turn a code at a rounding boundary
    assert float((found - exact).norm() / exact.norm()) < 2e-3


class Counting(torch.nn.Module):
    """Stands for a denoiser; its calls are told apart by their number."""

    def forward(self, x: torch.Tensor, *, number: int) -> torch.Tensor:
        return x


def drawing(model: torch.nn.Module, widths: list[int]):
    return lambda: [model(torch.zeros(1, width), number=i) for i, width in enumerate(widths)]


def numbers(calls: tuple[Call, ...]) -> list[int]:
    return [call.kwargs["number"] for call in calls]


def test_a_trajectory_is_one_strand_of_calls():
    model = Counting()
    once, twice = drawing(model, [4] * 5), drawing(model, [4, 6] * 5)
    (only,) = record_trajectories(model, [once], steps=5, most=3)
    assert (numbers(only.calls), only.length) == ([0, 2, 4], 5)
    first, second = record_trajectories(model, [twice], steps=5, most=5)
    assert numbers(first.calls) == [0, 2, 4, 6, 8]  # with the prompt
    assert numbers(second.calls) == [1, 3, 5, 7, 9]  # and without it
    mixed = record_trajectories(model, [drawing(model, [4, 4, 6])], steps=3, most=5)
    assert [numbers(each.calls) for each in mixed] == [[0], [1], [2]]  # no sum over different shapes


def test_pairs_of_steps_stand_for_the_whole_sum():
    made = torch.Generator().manual_seed(0)
    errors = [(torch.randn(3, 5, generator=made), torch.randn(2, 5, generator=made)) for _ in range(6)]
    signals = signals_of(errors)
    summed = [torch.stack(part).sum(0).square().sum() / 6 for part in zip(*errors, strict=True)]
    exact = sum(float(power) / signal for power, signal in zip(summed, signals, strict=True))
    assert float(trajectory_error(errors, signals, 6)) == pytest.approx(exact, rel=1e-5)
    samples = [float(trajectory_error(some, signals, 6)) for some in itertools.combinations(errors, 3)]
    assert sum(samples) / len(samples) == pytest.approx(exact, rel=1e-5)


def test_what_stays_from_step_to_step_weighs_as_often_as_there_are_steps():
    same = [(torch.ones(4),)] * 10
    assert float(trajectory_error(same, [4.0], 10)) == pytest.approx(10)
    assert float(trajectory_error(same[:1], [4.0], 10)) == pytest.approx(1)


def test_a_gain_is_the_power_that_a_layers_noise_has_at_the_output(solved):
    """Against noise that is really put on a layer's output."""
    _, _, load = solved
    model = load()
    (trajectory,) = record_trajectories(model, [draw_of(model, 1)], steps=1, most=1)
    call = trajectory.calls[0]
    names = ["transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp"]
    gains = output_gains(model, names, [call] * 40, seed=0)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        exact = model(*call.args, **call.kwargs)[0]
        for name in names:

            def disturb(_, inputs, out: torch.Tensor) -> torch.Tensor:
                noise = torch.randn(out.shape, generator=made)
                return out + 1e-3 * out.square().mean().sqrt() * noise

            handle = model.get_submodule(name).register_forward_hook(disturb)
            lost = [model(*call.args, **call.kwargs)[0] - exact for _ in range(40)]
            handle.remove()
            power = sum(float(each.square().sum()) for each in lost) / 40 / float(exact.square().sum())
            # 40 random probes and 40 random noises leave an uncertainty of some 10 % each
            assert gains[name] == pytest.approx(power / 1e-6, rel=0.3)


def test_gains_leave_the_model_as_it_was(solved):
    _, _, load = solved
    model = load()
    (trajectory,) = record_trajectories(model, [draw_of(model, 1)], steps=1, most=1)
    output_gains(model, ["transformer_blocks.0.ff.net.2"], trajectory.calls, seed=0)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.is_gradient_checkpointing
    assert not model.get_submodule("transformer_blocks.0.ff.net.2")._forward_hooks


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sana", "qwen-image", "z-image", "flux2"])
def test_blocks_are_given_what_the_whole_model_gives_them(family: str, tmp_path: Path):
    """Though they have no weights until it is their turn, and those before them are not run again: in stacks, in
    models of several stacks, and in UNets, whose skips go around blocks."""
    source = tiny_pipeline(family, tmp_path / family)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    calibration = Calibration(
        prompts=str(tmp_path / "prompts.txt"), samples=1, steps=2, height=32, width=32, max_sequence_length=16
    )
    prepared = prepare(default_recipe(str(source), calibration=calibration))
    recordings = record_blocks(
        prepared,
        sampling_for(prepared.recipe, prepared.source),
        Sample(images=1, batches=1, calls=2),
        options=CPU,
        device=torch.device("cpu"),
        observe=ignore_events,
    )
    recording = recordings[prepared.source.component]
    order = recording.block_graph.order
    assert set(order) == set(blocks_of(prepared.plan))
    made_for = {"class_name": prepared.plan.model_class, "device": torch.device("cpu")}
    whole, _ = load_beside(prepared.source, (), **made_for)
    bare, weights = load_beside(prepared.source, order, **made_for)
    stream = HiddenStates(
        bare, recording.block_graph, recording.calls, TensorCache(tmp_path / "shelf", host_bytes=1000)
    )
    for block in order:
        assert all(parameter.is_meta for parameter in bare.get_submodule(block).parameters())
        module = filled_copy(bare, block, weights, device=torch.device("cpu"))
        for index, call in enumerate(recording.calls):
            given = stream.given(block, index, torch.device("cpu"))
            wanted = given_in(whole, block, call)
            assert_same(given, wanted)
            with torch.no_grad():
                stream.keep(block, index, module(*given.args, **given.kwargs))
            stream.forget(block, index)


def given_in(model: torch.nn.Module, block: str, call: Call) -> Call:
    """What a block is given in a call of the whole model."""
    seen: list[Call] = []
    handle = model.get_submodule(block).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(Call(args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(*call.args, **call.kwargs)
    handle.remove()
    return seen[0]


def assert_same(given: Call, wanted: Call) -> None:
    one, other = (tree_flatten((call.args, call.kwargs)) for call in (given, wanted))
    assert one[1] == other[1]
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
