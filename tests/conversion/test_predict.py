"""What --plan predicts, against what is allocated and written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdq_cli.calibration.covariance import stored_covariance
from svdq_cli.conversion.block_forecast import BlockForecast, block_forecast
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.memory_backoff import Placement, memory_need
from svdq_cli.conversion.plan import predict
from svdq_cli.conversion.record import output_sample, record_blocks, tuning_sample
from svdq_cli.errors import OutOfResourcesError
from svdq_cli.inference.load import load_beside
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import counts_of, prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.reconstruct import Reconstruction, TensorCache, fit_output, tune_model, tuning
from svdq_cli.reconstruct.tunable_model import TunableModel
from svdq_cli.records import (
    ActivationStats,
    Event,
    Int4,
    Linear,
    NvFp4,
    Precision,
    SharedInput,
    SolveSettings,
    W4A4Plan,
    ignore_events,
)
from svdq_cli.solve.costs import NOMINAL, solve_bytes, solve_work
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.linear import solve_input
from svdq_cli.system.machine import resident_ram
from tests.allocations import Allocations
from tests.solving import solved_in

CPU = RunOptions(device="cpu")
DATA_FREE = SolveSettings("none", 0, torch.bfloat16)
PAPERS = SolveSettings("grid", 0, torch.bfloat16)
SEARCHED = SolveSettings("grid", 0, torch.bfloat16, ("learned", "refine", "gptq", "refit"))


class _ReadWhenAsked(Mapping[str, LinearWeights]):
    """Weights that are converted each time, and held by nobody."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> LinearWeights:
        return LinearWeights(self._stored[name].float(), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@pytest.mark.parametrize(("precision", "rank"), [(Int4(), 32), (Int4(), 192), (NvFp4(), 32)])
@pytest.mark.parametrize(
    ("settings", "streamed"),
    [(DATA_FREE, False), (DATA_FREE, True), (PAPERS, False), (SEARCHED, False), (SEARCHED, True)],
    ids=["data-free", "data-free, streamed", "grid", "all steps", "all steps, streamed"],
)
@pytest.mark.parametrize(
    ("branches", "k", "rows"),
    [
        (((1024,),), 512, 512),
        (((256,),), 1024, 256),
        (((256, 256, 256), (512,)), 512, 512),
        (((128, 128, 128), (512,)), 256, 2048),
    ],
)
def test_solving_takes_the_memory_that_is_predicted(
    settings: SolveSettings,
    branches: tuple[tuple[int, ...], ...],
    k: int,
    rows: int,
    streamed: bool,
    precision: Precision,
    rank: int,
):
    sizes = [n for branch in branches for n in branch]
    names = [f"layer{index}" for index in range(len(sizes))]
    waiting = iter(names)
    shared = SharedInput(
        names[0], tuple(names), tuple(tuple(next(waiting) for _ in part) for part in branches)
    )
    plans = {
        name: W4A4Plan(Linear(name, k, n, bias=False), precision, rank)
        for name, n in zip(names, sizes, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).bfloat16()
    stats = ActivationStats("x", x.abs().amax(0).float(), x.float().square().mean(0), x, rows)
    given = None if settings is DATA_FREE else stats
    stored = {
        name: torch.randn(n, k, generator=generator).bfloat16() for name, n in zip(names, sizes, strict=True)
    }
    asked = _ReadWhenAsked(stored)
    with Allocations() as seen:
        solve_input(shared, plans, asked if streamed else dict(asked), given, settings)
    predicted = solve_bytes(shared, plans, settings, rows=0 if given is None else rows, streamed=streamed)
    assert predicted == pytest.approx(seen.most, rel=0.15)


def test_a_covariance_takes_no_memory_that_solving_with_rows_does_not():
    """Besides its own bytes, which are held already: the matrix takes the place of the rows' second moments."""
    k, rows = 1024, 512
    x = torch.randn(4 * k, k, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = x.float()
    covariance = stored_covariance(wide.mean(0), torch.cov(wide.T, correction=0), len(x))
    stats = ActivationStats(
        "l", wide.abs().amax(0), wide.square().mean(0), x[:rows], len(x), covariance=covariance
    )
    plan = W4A4Plan(Linear("l", k, 512, bias=False), Int4(), 32)
    shared = SharedInput("l", ("l",), (("l",),))
    weights = {"l": LinearWeights(torch.randn(512, k), None)}
    del x, wide
    with Allocations() as seen:
        solve_input(shared, {"l": plan}, weights, stats, SEARCHED)
    predicted = solve_bytes(shared, {"l": plan}, SEARCHED, rows=rows)
    assert seen.most <= 1.15 * predicted
    on_cpu = Placement(torch.device("cpu"), streamed=False)
    without, held = (
        memory_need(on_cpu, shared, {"l": plan}, SEARCHED, rows=rows, itemsize=2, covariance=there).ram
        for there in (False, True)
    )
    assert held - without == covariance.bytes


def best_recipe(source: Path, folder: Path, **drawn: object) -> Recipe:
    (folder / "prompts.txt").write_text("\n".join(f"{count} red circles" for count in range(2)))
    wanted = {"prompts": str(folder / "prompts.txt"), "samples": 2, "steps": 4, "rows": 64, **drawn}
    return default_recipe(
        str(source),
        calibration=Calibration.model_validate(wanted),
        quantization=Quantization(effort="best", rank=16),
    )


@pytest.mark.parametrize(("side", "text"), [(16, 16), (48, 48)])
def test_tuning_takes_the_memory_that_is_predicted(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, text: int
):
    """With few tokens it is the weights' and with many the activations' that counts."""
    monkeypatch.setattr(tuning, "STEPS", 2)
    monkeypatch.setattr(tuning, "JUDGE_EVERY", 1)
    job, forecast = recorded_job(tiny_flux, tmp_path, tuned=True, height=side, width=side, text=text)
    assert forecast.calls.all == len(job.recording.calls)
    model = TunableModel(job)
    monkeypatch.setattr(tuning, "TunableModel", lambda _: model)
    with Allocations() as made:
        tune_model(job, seed=0)
    predicted = forecast.device_bytes - forecast.itemsize * forecast.beside
    predicted -= sum(parameter.nbytes for parameter in model.parameters)  # those there are already
    assert predicted == pytest.approx(made.most, rel=0.25)


def test_hidden_states_take_the_memory_that_is_predicted(tiny_flux: Path, tmp_path: Path):
    job, forecast = recorded_job(tiny_flux, tmp_path, tuned=False, height=32, width=32, text=32)
    seen = [0]

    def look(event: Event) -> None:
        if (folder := tmp_path / "shelf").exists():
            seen.append(sum(file.stat().st_size for file in folder.iterdir()))

    fit_output(job, observe=look)
    assert max(seen) == pytest.approx(forecast.passed_bytes, rel=0.25)


def recorded_job(
    source: Path, folder: Path, *, tuned: bool, height: int, width: int, text: int
) -> tuple[Reconstruction, BlockForecast]:
    """What is tuned, or gone through with all hidden states in files, and what that is expected to take."""
    recipe = best_recipe(source, folder, height=height, width=width, max_sequence_length=text)
    prepared, cpu = prepare(recipe), torch.device("cpu")
    sampling = sampling_for(recipe, prepared.source)
    sample = (tuning_sample if tuned else output_sample)(prepared, sampling)
    recordings = record_blocks(prepared, sampling, sample, options=CPU, device=cpu, observe=ignore_events)
    recording = recordings["transformer"]
    solutions = solved_in(folder / "work", prepared)
    model, weights = load_beside(
        prepared.source, recording.block_graph.order, class_name=prepared.plan.model_class, device=cpu
    )
    tensor_cache = TensorCache(folder / "shelf", host_bytes=0)
    job = Reconstruction(model, weights, prepared.plan, solutions, recording, tensor_cache)
    return job, block_forecast(prepared, sampling, sample, cpu, tuned=tuned)


def test_a_block_of_modulation_alone_is_forecast(tiny_flux: Path, tmp_path: Path):
    """Kandinsky 3 has blocks without a W4A4 layer."""
    recipe = best_recipe(tiny_flux, tmp_path, height=32, width=32, max_sequence_length=32)
    rules = [{"match": f"transformer_blocks.0.{part}", "skip": True} for part in ("attn", "ff", "ff_context")]
    prepared = prepare(Recipe.model_validate({**recipe.model_dump(exclude_none=True), "layers": rules}))
    sampling = sampling_for(recipe, prepared.source)
    sample, cpu = tuning_sample(prepared, sampling), torch.device("cpu")
    assert block_forecast(prepared, sampling, sample, cpu).passed_bytes == 0
    forecast = block_forecast(prepared, sampling, sample, cpu, tuned=False)
    assert forecast.sizes["transformer_blocks.0"].passed_bytes(2) == 0
    assert forecast.passed_bytes > 0


def test_a_model_that_memory_has_no_room_to_tune_is_refused_before_the_work(tiny_flux: Path, tmp_path: Path):
    recipe = best_recipe(tiny_flux, tmp_path, height=512, width=512, max_sequence_length=64)
    limit = resident_ram() + 300_000_000  # layers are solved in less
    with pytest.raises(
        OutOfResourcesError, match=r"tuning the model takes .* GB, but --max-ram allows"
    ) as caught:
        convert(recipe, tmp_path / "out", options=RunOptions(device="cpu", max_ram=limit))
    assert "batch_size" in str(caught.value.hint)
    assert not list(tmp_path.glob("*out*"))


def test_best_takes_longer_and_more_disk_than_balanced(tiny_flux: Path, tmp_path: Path):
    best = best_recipe(tiny_flux, tmp_path, height=32, width=32, max_sequence_length=32)
    balanced = best.model_copy(update={"quantization": Quantization(effort="balanced", rank=16)})
    one, other = (predict(recipe, options=CPU) for recipe in (best, balanced))
    assert one.stages.solve > 2 * other.stages.solve
    assert one.disk_bytes > other.disk_bytes
    assert one.warnings == other.warnings


def test_a_disk_needs_room_for_the_statistics_that_a_conversion_generates(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = best_recipe(tiny_flux, tmp_path, height=32, width=32, max_sequence_length=32).model_copy(
        update={"quantization": Quantization(effort="balanced", rank=16)}
    )
    data_free = recipe.model_copy(update={"quantization": Quantization(effort="datafree", rank=16)})
    fullest, without = (predict(one, options=CPU).disk_bytes for one in (recipe, data_free))
    usage = shutil.disk_usage(tmp_path)
    room = without + (fullest - without) // 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    with pytest.raises(OutOfResourcesError) as caught:
        convert(recipe, tmp_path / "out", options=CPU)
    assert caught.value.kind == "disk-full"
    assert not list(tmp_path.glob("*out*"))


def test_every_step_costs_time():
    plan = {"a": W4A4Plan(Linear("a", 512, 512, bias=False), Int4(), 32)}
    shared = SharedInput("a", ("a",), (("a",),))

    def seconds(settings: SolveSettings, rows: int) -> float:
        return NOMINAL.seconds(solve_work(shared, plan, settings, rows=rows))

    searched = [
        seconds(replace(SEARCHED, steps=steps), 512) for steps in ((), ("gptq",), ("learned", "gptq"))
    ]
    assert seconds(DATA_FREE, 0) < searched[0] < searched[1] < searched[2]


def test_what_is_written_is_what_was_predicted(tiny_flux: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo cats\n")
    recipe = default_recipe(
        str(tiny_flux),
        calibration=Calibration(prompts=str(prompts), samples=2, steps=2, height=16, width=16, rows=64),
        quantization=Quantization(effort="fast", rank=16),
    )
    plan = predict(recipe, options=CPU)
    report = convert(recipe, tmp_path / "out", options=CPU)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    # headers weigh much in a tiny model
    assert plan.bytes.output == pytest.approx(report.bytes.output, rel=0.25)
    assert written < plan.disk_bytes, "the work folder is part of it"
    assert plan.vram_bytes is None
    parts = plan.stages
    together = parts.prepare + parts.calibrate + parts.solve + parts.pack + parts.check
    assert plan.seconds == pytest.approx(together)
    assert min(parts.calibrate, parts.solve, parts.check) > 0


def test_images_of_many_tokens_need_be_fewer_for_the_last_linear():
    """FLUX.1-dev, 3,072 channels: 20 tokens for each of them, from four images at the least."""
    config = Path(__file__).parents[1] / "families/configs/flux1-dev.json"

    def images(side: int, batch_size: int) -> tuple[int, int, int]:
        wanted = {"height": side, "width": side, "batch_size": batch_size}
        recipe = default_recipe(str(config), calibration=Calibration.model_validate(wanted))
        prepared = prepare(recipe)
        sampling = sampling_for(recipe, prepared.source)
        sample = output_sample(prepared, sampling)
        tokens = counts_of(prepared, sampling.settings).by_layer["single_transformer_blocks.0.attn.to_v"]
        return tokens, sample.images, sample.batches

    assert images(2048, 1) == (16896, 4, 4)
    assert images(1024, 1) == (4608, 14, 14)
    assert images(1024, 8) == (4608, 14, 4)
    assert images(256, 16) == (768, 64, 4)
