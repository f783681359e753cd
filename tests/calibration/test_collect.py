from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor, nn

from svdq_cli.calibration import SamplingSettings, collect_stats, generate_images, load_source_pipeline
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.errors import InputError, UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.records import ActivationStats, Event, SharedInput
from tests.tiny_families import save_tiny
from tests.tiny_pipelines import PIPELINES, recipe_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

PROMPTS = ["a red circle", "two cats", "a small blue square"]
SETTINGS = SamplingSettings(steps=4, guidance=3.5, height=16, width=16, seed=1, max_sequence_length=24)
IMAGE_TOKENS, TEXT_TOKENS = 16, 24


def _shared(*layers: str) -> SharedInput:
    return SharedInput(name=layers[0], layers=layers, branches=(layers,))


BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
IMAGE = _shared(f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k", f"{BLOCK}.attn.to_v")
TEXT = _shared(f"{BLOCK}.attn.add_q_proj", f"{BLOCK}.attn.add_k_proj", f"{BLOCK}.attn.add_v_proj")
JOINT = _shared(f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp")
WIDE = _shared(f"{BLOCK}.ff.net.2")
MODULATION = _shared(f"{BLOCK}.norm1.linear")
INPUTS = (JOINT, IMAGE, TEXT, WIDE, MODULATION)


@pytest.fixture(scope="module")
def pipe(tiny_flux: Path) -> DiffusionPipeline:
    return load_source_pipeline(tiny_flux, dtype=torch.bfloat16)


@pytest.fixture
def transformer(pipe: DiffusionPipeline) -> nn.Module:
    return cast(Any, pipe).transformer


def _collect(
    pipe: DiffusionPipeline, settings: SamplingSettings = SETTINGS, *, rows: int = 90, inputs: Any = INPUTS
) -> dict[str, ActivationStats]:
    return collect_stats(pipe, cast(Any, pipe).transformer, inputs, PROMPTS, sampling=settings, rows=rows)


def _watch(pipe: DiffusionPipeline, layer: str, settings: SamplingSettings = SETTINGS) -> list[Tensor]:
    """Every activation that a layer reads while the prompts are drawn one by one, by a hook of the test's own."""
    seen: list[Tensor] = []
    module = cast(Any, pipe).transformer.get_submodule(layer)
    handle = module.register_forward_hook(lambda _module, args, _out: seen.append(args[0].clone()))
    generate_images(pipe, PROMPTS, settings=settings)
    handle.remove()
    return seen


@pytest.mark.parametrize(("item", "tokens"), [(IMAGE, 16), (TEXT, 24), (JOINT, 40), (WIDE, 16)])
def test_statistics_are_those_of_all_tokens_of_all_steps(
    pipe: DiffusionPipeline, item: SharedInput, tokens: int
):
    stats = _collect(pipe)[item.name]
    seen = torch.stack(_watch(pipe, item.layers[0])).flatten(0, 2)
    assert stats.tokens_seen == seen.shape[0] == len(PROMPTS) * SETTINGS.steps * tokens
    assert torch.equal(stats.abs_max, seen.abs().amax(0).float())
    # 1e-6: the mean is rounded once, to float32
    torch.testing.assert_close(stats.second_moment, seen.double().square().mean(0).float(), rtol=1e-6, atol=0)
    assert (stats.abs_max.dtype, stats.second_moment.dtype) == (torch.float32, torch.float32)


def test_every_image_and_step_gives_its_share_of_rows(pipe: DiffusionPipeline):
    stats = _collect(pipe, rows=30)[IMAGE.name]
    calls = _watch(pipe, IMAGE.layers[0])  # pictures x steps
    assert stats.rows.shape == (30, 128)
    assert stats.rows.dtype == torch.bfloat16
    owner = [next(i for i, call in enumerate(calls) if (call[0] == row).all(-1).any()) for row in stats.rows]
    assert owner == sorted(owner), "rows are ordered by picture and step"
    counts = [owner.count(i) for i in range(len(calls))]
    assert [sum(counts[p * 4 : p * 4 + 4]) for p in range(3)] == [10, 10, 10]
    assert set(counts) == {2, 3}


def test_few_rows_still_reach_every_image_and_different_steps_and_tokens(pipe: DiffusionPipeline):
    stats = _collect(pipe, rows=6)[IMAGE.name]
    calls = torch.stack(_watch(pipe, IMAGE.layers[0])).reshape(3, 4, IMAGE_TOKENS, 128)
    places = [(calls == row).all(-1).nonzero()[0].tolist() for row in stats.rows]
    assert [image for image, _, _ in places] == [0, 0, 1, 1, 2, 2]
    assert len({step for _, step, _ in places}) >= 3
    assert len({token for _, _, token in places}) >= 5


def test_an_input_with_fewer_tokens_than_rows_is_kept_whole(pipe: DiffusionPipeline):
    stats = _collect(pipe, rows=10_000)
    for item in INPUTS:
        assert stats[item.name].rows.shape[0] == stats[item.name].tokens_seen <= 10_000
    seen = torch.cat(_watch(pipe, MODULATION.layers[0]))
    assert torch.equal(stats[MODULATION.name].rows, seen)
    assert stats[MODULATION.name].tokens_seen == len(PROMPTS) * SETTINGS.steps


@pytest.mark.parametrize("rows", [1, 2, 11, 13, 90, 191, 192, 193])
def test_never_more_rows_than_asked_for(pipe: DiffusionPipeline, rows: int):
    kept = _collect(pipe, replace(SETTINGS, steps=2), rows=rows, inputs=(TEXT, MODULATION))
    assert kept[TEXT.name].rows.shape[0] == min(rows, 3 * 2 * TEXT_TOKENS)
    assert kept[MODULATION.name].rows.shape[0] <= min(rows, 3 * 2)


def test_the_same_arguments_give_the_same_bits(pipe: DiffusionPipeline):
    first, second = _collect(pipe), _collect(pipe)
    assert list(first) == [item.name for item in INPUTS]
    for name, stats in first.items():
        assert torch.equal(stats.abs_max, second[name].abs_max)
        assert torch.equal(stats.second_moment, second[name].second_moment)
        assert torch.equal(stats.rows, second[name].rows)


def test_another_seed_gives_other_rows(pipe: DiffusionPipeline):
    other = _collect(pipe, replace(SETTINGS, seed=2))
    assert not torch.equal(other[IMAGE.name].rows, _collect(pipe)[IMAGE.name].rows)


def test_the_batch_size_does_not_change_which_rows_are_kept(tiny_flux: Path):
    pipe = load_source_pipeline(tiny_flux, dtype=torch.float32)
    alone = _collect(pipe)
    together = _collect(pipe, replace(SETTINGS, batch_size=2))
    for name, stats in alone.items():
        # 2e-2: rows are stored as bfloat16 (8 bits); float32 sums of another batch size may tip their last bit
        torch.testing.assert_close(stats.rows, together[name].rows, rtol=2e-2, atol=1e-3)
        assert stats.tokens_seen == together[name].tokens_seen


@pytest.mark.parametrize("name", ["animatediff", "svd"])
def test_frames_that_are_folded_into_the_batch_stay_with_their_video(name: str, tmp_path: Path):
    """(B F, N, K) and (B H W, F, K), both passes of guidance in one call: rows of a video are its own, at any batch
    size, so that those that judge are of other videos than those that are learned from."""
    tiny = PIPELINES[name]
    recipe = recipe_of(save_tiny(tiny.make, tmp_path / "source"), tiny)
    prepared = prepare(recipe, every_layer=True)
    settings = replace(sampling_for(recipe, prepared.source).settings, steps=1)
    pipe = load_source_pipeline(tmp_path / "source", dtype=torch.float32)
    alone, together = (
        collect_stats(
            pipe,
            pipe.components["unet"],
            prepared.plan.inputs,
            PROMPTS[:2],
            sampling=replace(settings, batch_size=size),
            rows=64,
        )
        for size in (1, 2)
    )
    for name, stats in alone.items():
        # rows are stored as bfloat16; sums of another batch size may tip their last bit
        torch.testing.assert_close(stats.rows, together[name].rows, rtol=2e-2, atol=2e-2)


def test_tokens_that_stand_before_the_batch_stay_with_their_image(tmp_path: Path):
    """ERNIE-Image's feed-forward reads (tokens, batch, K), its attention (batch, tokens, K)."""
    tiny = PIPELINES["ernie"]
    recipe = recipe_of(save_tiny(tiny.make, tmp_path / "source"), tiny)
    prepared = prepare(recipe, every_layer=True)
    settings = replace(sampling_for(recipe, prepared.source).settings, steps=1)
    pipe = load_source_pipeline(tmp_path / "source", dtype=torch.float32)
    # as long as each other: the text of a batch is padded to the longest
    prompts = ["a red circle", "a big square"]
    alone, together = (
        collect_stats(
            pipe,
            pipe.components["transformer"],
            prepared.plan.inputs,
            prompts,
            sampling=replace(settings, batch_size=size),
            rows=64,
        )
        for size in (1, 2)
    )
    for name, stats in alone.items():
        assert len(stats.rows) == 64, name
        torch.testing.assert_close(stats.rows, together[name].rows, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["wan-vace", "prx", "amused", "ace-step", "minimax-h3"])
def test_pipelines_that_take_one_prompt_at_a_time_ask_for_that_batch_size(name: str, tmp_path: Path):
    """They raise what they happen to run into: ValueError, RuntimeError, AttributeError, IndexError."""
    tiny = PIPELINES[name]
    recipe = recipe_of(save_tiny(tiny.make, tmp_path / "source"), tiny)
    assert recipe.calibration is not None
    wanted = recipe.calibration.model_copy(update={"batch_size": 2})
    with pytest.raises(UsageError, match="could not generate for 2 prompts at once") as caught:
        calibrate(
            recipe.model_copy(update={"calibration": wanted}),
            tmp_path / "calib",
            options=RunOptions(device="cpu"),
        )
    assert "--batch-size 1" in str(caught.value.hint)


def test_a_pipeline_that_reads_a_prompt_otherwise_among_several_asks_for_one_at_a_time(tmp_path: Path):
    """Latte cuts the text of one prompt, and pads that of several with zeros that are attended to."""
    tiny = PIPELINES["latte"]
    recipe = recipe_of(save_tiny(tiny.make, tmp_path / "source"), tiny)
    settings = replace(sampling_for(recipe, prepare(recipe).source).settings, batch_size=2)
    pipe = load_source_pipeline(tmp_path / "source", dtype=torch.float32)
    with pytest.raises(UsageError, match="its images depend on their batch") as caught:
        generate_images(pipe, PROMPTS[:2], settings=settings)
    assert "--batch-size 1" in str(caught.value.hint)


def test_unconditional_passes_are_seen_too(pipe: DiffusionPipeline):
    guided = replace(SETTINGS, true_cfg=3.0)
    stats = _collect(pipe, guided, rows=48)[TEXT.name]
    calls = _watch(pipe, TEXT.layers[0], guided)
    assert stats.tokens_seen == 2 * len(PROMPTS) * SETTINGS.steps * TEXT_TOKENS
    assert torch.equal(stats.abs_max, torch.cat(calls).abs().amax((0, 1)).float())
    assert stats.rows.shape[0] == 48
    # the unconditional text is the same for all prompts: both kinds of pass gave rows
    unconditional = torch.cat(calls[1::2]).flatten(0, 1)
    from_unconditional = [(unconditional == row).all(-1).any().item() for row in stats.rows]
    assert 16 <= sum(from_unconditional) <= 32


def test_progress_counts_images_times_steps(pipe: DiffusionPipeline, transformer: nn.Module):
    events: list[Event] = []
    collect_stats(
        pipe,
        transformer,
        [TEXT],
        PROMPTS,
        sampling=replace(SETTINGS, batch_size=2),
        rows=8,
        observe=events.append,
    )
    assert [e.done for e in events] == [0, 2, 4, 6, 8, 9, 10, 11, 12, 12]
    assert {(e.stage, e.total) for e in events} == {("calibrate", 12)}


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_layer_that_never_runs_is_named(pipe: DiffusionPipeline, transformer: nn.Module):
    transformer.add_module("spare", nn.Linear(128, 128))
    try:
        with pytest.raises(InputError, match=r"spare: the pipeline never ran it") as caught:
            _collect(pipe, inputs=[TEXT, _shared("spare")])
        assert caught.value.where == "spare"
        assert caught.value.hint
    finally:
        del transformer.spare
    assert _hooks(transformer) == 0


def test_a_layer_that_the_model_lacks_is_named(pipe: DiffusionPipeline, transformer: nn.Module):
    with pytest.raises(InputError, match=r"no\.such\.layer: FluxTransformer2DModel has no such layer"):
        _collect(pipe, inputs=[TEXT, _shared("no.such.layer")])
    assert _hooks(transformer) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_activation_is_named_where_it_first_appears(tiny_flux: Path, value: float):
    pipe = load_source_pipeline(tiny_flux, dtype=torch.bfloat16)
    transformer = cast(Any, pipe).transformer
    with torch.no_grad():
        transformer.get_submodule(f"{BLOCK}.ff.net.0.proj").bias[3] = value
    events: list[Event] = []
    with pytest.raises(InputError, match=r"blocks\.0\.ff\.net\.2: .*NaN or infinity.*bfloat16") as caught:
        collect_stats(pipe, transformer, [WIDE], PROMPTS, sampling=SETTINGS, rows=8, observe=events.append)
    assert "float32" in str(caught.value.hint)
    assert [event.kind for event in events] == ["start"], "found after the first step"
    assert _hooks(transformer) == 0


def test_nothing_to_calibrate_with_is_refused(pipe: DiffusionPipeline, transformer: nn.Module):
    with pytest.raises(UsageError, match="no prompt"):
        collect_stats(pipe, transformer, [TEXT], [], sampling=SETTINGS, rows=8)
    with pytest.raises(UsageError, match="rows"):
        collect_stats(pipe, transformer, [TEXT], PROMPTS, sampling=SETTINGS, rows=0)
