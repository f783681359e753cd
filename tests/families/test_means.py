"""A mean that moves into biases leaves what the model computes as it was, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svdq_cli.evaluation.outputs import output_sqnr, record_outputs
from svdq_cli.families import find_family
from svdq_cli.inference.load import load_16bit_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.means import mean_places
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import default_recipe
from svdq_cli.records import ignore_events
from svdq_cli.source.means import without_means
from svdq_cli.source.model import MovedMean
from tests.tiny_families import tiny_pipeline

# How many vectors move in the tiny model: modulated inputs and attention outputs, where readers have biases
PLACES = {"flux-kontext": 7, "sd3": 11, "pixart": 4, "sana": 1, "qwen-image": 5, "sdxl": 4}
EXACT_DB = 90.0  # float32 sums in another order


@pytest.mark.parametrize(("family", "count"), PLACES.items())
def test_the_model_gives_what_it_gave(family: str, count: int, tmp_path: Path):
    prepared = prepare(default_recipe(str(tiny_pipeline(family, tmp_path / family))))
    source = prepared.source
    places = mean_places(find_family(source.config), prepared.inventory, prepared.plan)
    assert len(places) == count
    generator = torch.Generator().manual_seed(0)
    moved = [
        MovedMean(place.readers, place.producers, torch.randn(place.width, generator=generator))
        for place in places
    ]
    settings = SamplingSettings(steps=2, guidance=2.0, height=64, width=64, seed=0, max_sequence_length=16)
    device, class_name = torch.device("cpu"), prepared.plan.model_class
    before = load_16bit_pipeline(source, class_name=class_name, device=device)
    calls = record_outputs(before, source.components, ["a red circle"], settings, ignore_events)
    after = load_16bit_pipeline(
        without_means(source, moved, torch.float32), class_name=class_name, device=device
    )
    models = {name: getattr(after, name) for name in source.components}
    found = output_sqnr(models, calls, device, steps=2)
    assert found is not None
    assert found.step > EXACT_DB
    # and a mean that its readers do not take back is seen
    half = [MovedMean((), each.producers, each.mean) for each in moved]
    broken = load_16bit_pipeline(
        without_means(source, half, torch.float32), class_name=class_name, device=device
    )
    models = {name: getattr(broken, name) for name in source.components}
    assert output_sqnr(models, calls, device, steps=2).step < EXACT_DB / 2  # pyright: ignore[reportOptionalMemberAccess]
