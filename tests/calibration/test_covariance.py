"""The covariance of an input over more tokens than its rows: whose tokens, in what order, and what it may take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch import Tensor

from svdq_cli.calibration import SamplingSettings, collect_stats, generate_images, load_source_pipeline
from svdq_cli.calibration.budget import (
    MOST_TOKENS,
    TOKENS_PER_CHANNEL,
    covariance_rows_bytes,
    covariance_tokens,
    covariances_bytes,
    statistics_bytes,
)
from svdq_cli.calibration.collect import collect_parts
from svdq_cli.calibration.covariance import CovarianceSum, covariance_bytes
from svdq_cli.calibration.parts import MergedStats, PartFolder
from svdq_cli.calibration.row_sampling import RowSampling
from svdq_cli.pipelines.batches import split_batches
from svdq_cli.records import ActivationStats, InputCovariance, SharedInput
from svdq_cli.solve.covariance import moments_of

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

PROMPTS = ["a red circle", "two cats", "a small blue square", "rain"]
SETTINGS = SamplingSettings(steps=2, guidance=3.5, height=16, width=16, seed=1, max_sequence_length=24)
LAYER, NARROW = "single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"
INPUTS = tuple(SharedInput(name, (name,), ((name,),)) for name in (LAYER, NARROW))
ROWS, ALL = 20, 10_000


@pytest.fixture(scope="module")
def pipe(tiny_flux: Path) -> DiffusionPipeline:
    return load_source_pipeline(tiny_flux, dtype=torch.float32)


@pytest.fixture(scope="module")
def stats(pipe: DiffusionPipeline) -> dict[str, ActivationStats]:
    return collect_stats(
        pipe,
        cast(Any, pipe).transformer,
        INPUTS,
        PROMPTS,
        sampling=SETTINGS,
        rows=ROWS,
        covariance_tokens={LAYER: ALL, NARROW: 0},
    )


def _same(found: InputCovariance | None, expected: InputCovariance | None) -> bool:
    assert found is not None
    assert expected is not None
    parts = ("mean", "deviation", "correlations")
    return found.tokens == expected.tokens and all(
        torch.equal(getattr(found, part), getattr(expected, part)) for part in parts
    )


def test_it_is_of_every_token_of_the_images_that_the_search_learns_from(
    pipe: DiffusionPipeline, stats: dict[str, ActivationStats]
):
    seen: list[Tensor] = []
    layer = cast(Any, pipe).transformer.get_submodule(LAYER)
    handle = layer.register_forward_hook(lambda _module, args, _out: seen.append(args[0].clone()))
    generate_images(pipe, PROMPTS[:3], settings=SETTINGS)  # the rows of the fourth judge
    handle.remove()
    tokens = torch.stack(seen).flatten(0, 2).bfloat16().double()
    found = stats[LAYER].covariance
    assert found is not None
    assert found.tokens == len(tokens) == 3 * 2 * 40
    exact = (tokens.T @ tokens / len(tokens)).float()
    # what float16 makes of a correlation
    sizes = exact.diagonal().sqrt()
    lost = (moments_of(found, torch.ones(tokens.shape[1])) - exact) / sizes / sizes.unsqueeze(1)
    assert float(lost.abs().max()) < 2**-11


def test_an_input_that_needs_none_has_none_and_the_rows_are_those_without(
    pipe: DiffusionPipeline, stats: dict[str, ActivationStats]
):
    assert stats[NARROW].covariance is None
    plain = collect_stats(pipe, cast(Any, pipe).transformer, INPUTS, PROMPTS, sampling=SETTINGS, rows=ROWS)
    assert all(torch.equal(plain[name].rows, stats[name].rows) for name in stats)
    assert plain[LAYER].covariance is None


def test_it_has_the_same_bits_wherever_and_whenever_the_images_were_generated(
    pipe: DiffusionPipeline, stats: dict[str, ActivationStats], tmp_path: Path
):
    spread = RowSampling(ROWS, len(PROMPTS), SETTINGS.seed, covariance_tokens={LAYER: ALL, NARROW: 0})
    batches = split_batches(PROMPTS, settings=SETTINGS)
    for share in (batches[1::2], batches[0::2]):
        collect_parts(
            pipe,
            cast(Any, pipe).transformer,
            INPUTS,
            share,
            sampling=SETTINGS,
            spread=spread,
            parts=PartFolder(tmp_path),
        )
    found = MergedStats(PartFolder(tmp_path), [each.name for each in INPUTS])
    assert _same(found[LAYER].covariance, stats[LAYER].covariance)
    assert found[NARROW].covariance is None


def test_a_single_image_has_no_tokens_to_learn_from_apart_from_those_that_judge():
    assert (
        RowSampling(rows=ROWS, images=1, seed=0, covariance_tokens={LAYER: ALL}).for_covariance(LAYER) is None
    )


def test_no_more_tokens_than_there_are_rows_are_worth_nothing():
    of_tokens = CovarianceSum()
    of_tokens.add(torch.randn(30, 8))
    assert of_tokens.covariance(more_than=30) is None
    of_tokens.add(torch.randn(1, 8))
    found = of_tokens.covariance(more_than=30)
    assert found is not None
    assert found.tokens == 31


def test_a_large_mean_does_not_drown_what_varies():
    x = 1e4 + torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)) @ torch.rand(64, 64)
    of_tokens = CovarianceSum()
    for part in x.split(100):
        of_tokens.add(part)
    found = of_tokens.covariance(more_than=0)
    assert found is not None
    exact = x.double().std(0, correction=0).float()
    torch.testing.assert_close(found.deviation, exact, rtol=1e-3, atol=0)


def test_the_narrowest_inputs_come_first_and_what_has_rows_enough_needs_none():
    widths, used = [64, 3072, 12288, 3072, 3072], [True, True, True, True, False]
    rows = 4096
    base = statistics_bytes(widths, rows=rows)
    enough = covariance_tokens(widths, used, rows=rows, budget=base + 10**9)
    assert enough[0] == enough[4] == 0
    assert enough[1] == enough[3] == TOKENS_PER_CHANNEL * 3072
    assert enough[2] == MOST_TOKENS
    assert base + covariances_bytes(widths, enough) <= base + 10**9
    assert covariance_rows_bytes(widths, enough) == sum(
        2 * width * count for width, count in zip(widths, enough, strict=True)
    )
    tight = covariance_tokens(widths, used, rows=rows, budget=base + 2 * covariance_bytes(3072))
    assert [bool(count) for count in tight] == [False, True, False, True, False]
    assert covariance_tokens(widths, used, rows=rows, budget=base) == [0] * 5
