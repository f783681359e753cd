"""Calibration that stops and goes on, runs in several places, or goes without its text encoders: the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import nn

from svdq_cli.calibration import SamplingSettings, collect_stats, load_source_pipeline
from svdq_cli.calibration.budget import rows_within, statistics_bytes
from svdq_cli.calibration.collect import collect_parts
from svdq_cli.calibration.parts import MergedStats, PartFolder
from svdq_cli.calibration.row_sampling import RowSampling
from svdq_cli.errors import InputError, UsageError
from svdq_cli.pipelines.batches import Batch, split_batches
from svdq_cli.pipelines.encode import FreedEncoder, encode_prompts
from svdq_cli.pipelines.first_call import first_call
from svdq_cli.records import ActivationStats, Event, Observer, SharedInput, ignore_events

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

PROMPTS = ["a red circle", "two cats", "a small blue square", "rain"]
DRAW = SamplingSettings(steps=2, guidance=3.5, height=16, width=16, seed=1, max_sequence_length=24)
ROWS = 50
NAMES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
INPUTS = tuple(SharedInput(name, (name,), ((name,),)) for name in NAMES)
BATCHES = split_batches(PROMPTS, settings=DRAW)


@pytest.fixture(scope="module")
def pipe(tiny_flux: Path) -> DiffusionPipeline:
    return load_source_pipeline(tiny_flux, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(pipe: DiffusionPipeline) -> dict[str, ActivationStats]:
    return collect_stats(pipe, cast(Any, pipe).transformer, INPUTS, PROMPTS, sampling=DRAW, rows=ROWS)


def _collect(
    pipe: DiffusionPipeline,
    parts: PartFolder,
    *,
    batches: Sequence[Batch] = BATCHES,
    observe: Observer = ignore_events,
    **options: Any,
) -> None:
    spread = RowSampling(rows=ROWS, images=len(PROMPTS), seed=DRAW.seed)
    model = cast(Any, pipe).transformer
    collect_parts(
        pipe, model, INPUTS, batches, sampling=DRAW, spread=spread, parts=parts, observe=observe, **options
    )


def _require_same(found: Any, expected: dict[str, ActivationStats]) -> None:
    assert tuple(found) == NAMES
    for name, stats in expected.items():
        assert torch.equal(found[name].abs_max, stats.abs_max)
        assert torch.equal(found[name].second_moment, stats.second_moment)
        assert torch.equal(found[name].rows, stats.rows)
        assert found[name].tokens_seen == stats.tokens_seen


def test_a_stopped_calibration_goes_on_with_the_image_it_stood_at(
    pipe: DiffusionPipeline, expected: dict[str, ActivationStats], tmp_path: Path
):
    parts = PartFolder(tmp_path / "parts")

    def stop_in_the_third_image(event: Event) -> None:
        if event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _collect(pipe, parts, observe=stop_in_the_third_image)
    assert list(parts) == [0, 1]
    events: list[Event] = []
    _collect(pipe, parts, observe=events.append)
    assert [event.done for event in events] == [4, 5, 6, 7, 8, 8]
    _require_same(MergedStats(parts, NAMES), expected)


def test_a_finished_calibration_generates_nothing(pipe: DiffusionPipeline, tmp_path: Path):
    _collect(pipe, PartFolder(tmp_path))
    events: list[Event] = []
    _collect(pipe, PartFolder(tmp_path), observe=events.append)
    assert events == []


def test_images_drawn_in_different_places_make_the_same_statistics(
    pipe: DiffusionPipeline, expected: dict[str, ActivationStats], tmp_path: Path
):
    parts = PartFolder(tmp_path)
    _collect(pipe, parts, batches=BATCHES[1::2])
    _collect(pipe, parts, batches=BATCHES[0::2])
    _require_same(MergedStats(parts, NAMES), expected)


def test_a_damaged_part_is_named(pipe: DiffusionPipeline, tmp_path: Path):
    parts = PartFolder(tmp_path)
    _collect(pipe, parts, batches=BATCHES[:1])
    file = tmp_path / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="000000") as caught:
        MergedStats(parts, NAMES)[NAMES[0]]
    assert "remove" in str(caught.value.hint)


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_text_encoders_go_before_the_denoiser_runs(tiny_flux: Path, tmp_path: Path, true_cfg: float):
    settings = replace(DRAW, true_cfg=true_cfg)
    batches = split_batches(PROMPTS[:2], settings=settings)
    pipe = load_source_pipeline(tiny_flux, dtype=torch.float32)
    model: nn.Module = cast(Any, pipe).transformer
    whole = collect_stats(pipe, model, INPUTS, PROMPTS[:2], sampling=settings, rows=ROWS)
    encoded = encode_prompts(pipe, batches, settings=settings)
    assert encoded is not None
    assert isinstance(cast(Any, pipe).text_encoder, FreedEncoder)
    assert isinstance(cast(Any, pipe).text_encoder_2, FreedEncoder)
    parts = PartFolder(tmp_path)
    collect_parts(
        pipe,
        model,
        INPUTS,
        batches,
        sampling=settings,
        spread=RowSampling(rows=ROWS, images=2, seed=settings.seed),
        parts=parts,
        encoded=encoded,
    )
    _require_same(MergedStats(parts, NAMES), whole)


def test_a_pipelines_run_ends_at_its_first_call_of_the_denoiser(pipe: DiffusionPipeline):
    model: nn.Module = cast(Any, pipe).transformer
    batch = split_batches(PROMPTS[:1], settings=DRAW)[0]
    assert first_call(pipe, [nn.Linear(1, 1)], batch, settings=DRAW) is None, "that one is never called"
    given = first_call(pipe, [model], batch, settings=DRAW)
    assert given is not None
    args, kwargs = given
    assert not args
    with torch.no_grad():
        (out,) = model(**kwargs)
    assert out.shape == kwargs["hidden_states"].shape


def test_rows_fit_the_budget():
    widths = [3072] * 10 + [12288]
    assert rows_within(widths, rows=4096, budget=10**9) == 4096
    fewer = rows_within(widths, rows=4096, budget=10**8)
    assert statistics_bytes(widths, rows=fewer) <= 10**8 < statistics_bytes(widths, rows=fewer + 1)


def test_a_budget_for_hardly_a_row_is_refused():
    with pytest.raises(UsageError, match="holds 2 rows") as caught:
        rows_within([1000], rows=4096, budget=12_500)
    assert "0.001 GB" in str(caught.value.hint)
