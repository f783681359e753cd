"""Passes of a guided step as they are predicted, and as the library's own pipelines run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import diffusers
import pytest
import torch
from torch import nn

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.conversion.block_forecast import block_forecast
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.kept_tokens import kept_tokens
from svdq_cli.conversion.machine_speed import Speed
from svdq_cli.conversion.needs import needs_of
from svdq_cli.conversion.predict import Forecast, pass_seconds, stage_seconds
from svdq_cli.conversion.record import Sample, record_blocks
from svdq_cli.pipelines.batches import split_batches
from svdq_cli.pipelines.generate import denoise
from svdq_cli.pipelines.joint import denoisers_in
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import counts_of, prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Recipe
from svdq_cli.records import ignore_events
from svdq_cli.sampling.passes import StepPasses, step_passes
from svdq_cli.solve.costs import NOMINAL
from svdq_cli.source import open_source
from tests.tiny_families import save_tiny
from tests.tiny_pipelines import PIPELINES, recipe_of

STEPS = 2
CPU = RunOptions(device="cpu")
IMAGES = ("hidden_states", "sample", "x", "image_hidden_states")  # what denoisers call what they read


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recipe]:
    """The recipe of a tiny pipeline, which is written once."""
    made: dict[str, Recipe] = {}

    def recipe(name: str) -> Recipe:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = recipe_of(save_tiny(PIPELINES[name].make, folder / "source"), PIPELINES[name])
        return made[name]

    return recipe


def seen_passes(pipe: diffusers.DiffusionPipeline, settings: object) -> StepPasses:
    """Of one image in a step, as its denoisers saw them."""
    entries: list[int] = []

    def see(module: nn.Module, args: tuple[object, ...], given: dict[str, object]) -> None:
        read = next(x for x in (*args, *map(given.get, IMAGES)) if isinstance(x, (torch.Tensor, list)))
        entries.append(len(read))

    for model in denoisers_in(pipe).values():
        model.register_forward_pre_hook(see, with_kwargs=True)
    (batch,) = split_batches(["a red circle"], settings=settings)  # pyright: ignore[reportArgumentType]
    denoise(pipe, batch, settings=settings, output_type="latent")  # pyright: ignore[reportArgumentType]
    assert sum(entries) % STEPS == 0
    return StepPasses(sum(entries) // STEPS, max(entries))


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("sdxl", StepPasses(2, 2)),
        ("pixart", StepPasses(2, 2)),
        ("z-image", StepPasses(2, 2)),
        ("wan", StepPasses(2, 1)),
        ("qwen-image", StepPasses(2, 1)),
        ("flux", StepPasses(1, 1)),
        ("sana-sprint", StepPasses(1, 1)),
        ("hunyuan-video-1.5", StepPasses(2, 1)),
        ("svd", StepPasses(2, 2)),
        ("ace-step", StepPasses(2, 2)),
        ("ltx2", StepPasses(4, 2)),
        ("modular-z-image", StepPasses(1, 1)),
    ],
)
def test_a_model_is_seen_as_often_as_is_predicted(
    name: str, passes: StepPasses, tiny: Callable[[str], Recipe]
):
    recipe = tiny(name)
    source = open_source(Path(recipe.model.source))
    settings = sampling_for(recipe, source).settings
    pipe = load_source_pipeline(Path(recipe.model.source), dtype=torch.float32)
    assert step_passes(source, guidance=settings.guidance, true_cfg=settings.true_cfg) == passes
    assert seen_passes(pipe, settings) == passes


@pytest.mark.parametrize(
    ("name", "changes", "passes"),
    [
        ("sdxl", {"guidance": 1.0}, StepPasses(1, 1)),
        ("z-image", {"guidance": 0.5}, StepPasses(2, 2)),
        ("z-image", {"guidance": 0.0}, StepPasses(1, 1)),
        ("flux", {"true_cfg": 3.0}, StepPasses(2, 1)),
        ("qwen-image", {"true_cfg": 1.0}, StepPasses(1, 1)),
    ],
)
def test_what_a_recipe_says_of_guidance_counts(
    name: str, changes: dict[str, float], passes: StepPasses, tiny: Callable[[str], Recipe]
):
    recipe = tiny(name)
    source = open_source(Path(recipe.model.source))
    settings = replace(sampling_for(recipe, source).settings, **changes)
    pipe = load_source_pipeline(Path(recipe.model.source), dtype=torch.float32)
    assert step_passes(source, guidance=settings.guidance, true_cfg=settings.true_cfg) == passes
    assert seen_passes(pipe, settings) == passes


def test_a_distilled_model_and_one_whose_guider_is_off_run_once(
    tiny: Callable[[str], Recipe], tmp_path: Path
):
    folder = tmp_path / "klein"
    pipe = PIPELINES["flux2"].make()
    pipe.register_to_config(is_distilled=True)
    pipe.save_pretrained(folder)
    assert step_passes(open_source(folder), guidance=4.0, true_cfg=1.0) == StepPasses(1, 1)
    video = Path(tiny("hunyuan-video-1.5").model.source)
    config = video / "guider" / "guider_config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps({**json.loads(before), "guidance_scale": 1.0}))
        assert step_passes(open_source(video), guidance=None, true_cfg=1.0) == StepPasses(1, 1)
    finally:
        config.write_text(before)


def test_a_model_without_its_pipeline_is_counted_at_most(tiny: Callable[[str], Recipe]):
    """Memory and disk are asked for by this figure."""
    source = replace(open_source(Path(tiny("pixart").model.source)), pipeline=None)
    assert step_passes(source, guidance=None, true_cfg=1.0) == StepPasses(2, 2)
    assert step_passes(source, guidance=1.0, true_cfg=1.0) == StepPasses(1, 1)


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_a_guided_calibration_keeps_the_tokens_that_are_predicted(
    name: str, tiny: Callable[[str], Recipe], tmp_path: Path
):
    recipe = tiny(name)
    assert recipe.calibration is not None
    # so many rows that the tokens are what is kept
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"rows": 1 << 20})}
    )
    calibrate(recipe, tmp_path / "calib", options=CPU)
    prepared = prepare(recipe, every_layer=True)
    sampling = sampling_for(recipe, prepared.source)
    kept = kept_tokens(prepared, sampling, counts_of(prepared, sampling.settings)).rows
    stored = {entry.name: entry.rows for entry in open_calibration(tmp_path / "calib").manifest.inputs}
    image = [name for name in stored if ".attn2.to_k" not in name]  # of the text there may be less
    assert {name: stored[name] for name in image} == {name: kept[name] for name in image}


@pytest.mark.parametrize(
    ("name", "stacked", "calls"), [("pixart", 2, 1), ("wan", 1, 2)], ids=["one call", "two calls"]
)
def test_calls_of_a_guided_model_are_recorded_as_predicted(
    name: str, stacked: int, calls: int, tiny: Callable[[str], Recipe]
):
    recipe = tiny(name)
    prepared, cpu = prepare(recipe), torch.device("cpu")
    sampling = sampling_for(recipe, prepared.source)
    sample = Sample(images=32, batches=8, calls=8)
    recorded = record_blocks(prepared, sampling, sample, options=CPU, device=cpu, observe=ignore_events)[
        prepared.source.component
    ]
    forecast = block_forecast(prepared, sampling, sample, cpu)
    prompts = 2
    assert forecast.calls.all == len(recorded.calls) == prompts * calls * STEPS
    read = recorded.calls[0].kwargs.get("hidden_states", next(iter(recorded.calls[0].args), None))
    assert forecast.batch * forecast.tokens.passes.entries == len(cast("torch.Tensor", read)) == stacked


def test_a_step_takes_the_time_of_one_of_two_transformers_that_take_turns(tiny: Callable[[str], Recipe]):
    recipe = tiny("wan-2.2")
    prepared = prepare(recipe)
    speed = Speed(NOMINAL, forward=1e9, read=1e9, write=1e9, hashed=1e9)
    tokens = counts_of(prepared, sampling_for(recipe, prepared.source).settings)
    turns = pass_seconds(prepared.plan, tokens, speed)
    each_step = replace(prepared.plan, components=("transformer", "unconditional_transformer"))
    assert prepared.plan.components == ("transformer", "transformer_2")
    assert turns == pass_seconds(each_step, tokens, speed) / 2


def test_a_guided_calibration_takes_the_time_of_its_passes(tiny: Callable[[str], Recipe]):
    guided = tiny("wan")
    assert guided.calibration is not None
    alone = guided.model_copy(update={"calibration": guided.calibration.model_copy(update={"guidance": 1.0})})
    # of all that calibration takes, passes alone count at this speed
    speed = Speed(NOMINAL, forward=1.0, read=1e30, write=1e30, hashed=1e30)
    seconds: list[float] = []
    for recipe in (guided, alone):
        prepared = prepare(recipe)
        job = Forecast(prepared, needs_of(prepared, None), torch.device("cpu"), CPU)
        seconds.append(stage_seconds(job, speed, 0.0).calibrate)
    assert seconds[0] == pytest.approx(2 * seconds[1])
