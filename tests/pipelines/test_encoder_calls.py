"""What pipelines give their text encoders, without the weights of either."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdq_cli.pipelines.encoder_calls import EncoderCall, record_call
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sampling import usual_sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import default_recipe
from svdq_cli.source import text_encoders_of
from tests.tiny_families import save_tiny, tiny_pipeline
from tests.tiny_pipelines import PIPELINES

PROMPTS = [f"a photo of {count} cats" for count in range(6)]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sana", "qwen-image", "z-image", "flux2"])
def test_a_pipeline_is_run_up_to_its_encoders(family: str, tmp_path: Path):
    folder = tiny_pipeline(family, tmp_path / family)
    for encoder in text_encoders_of(folder):  # nothing of them is read
        (folder / encoder / "model.safetensors").unlink()
    source = source_of(default_recipe(str(folder)), RunOptions())
    settings = usual_sampling(source).settings
    for encoder in text_encoders_of(folder):
        call = record_call(source, encoder, PROMPTS, settings)
        assert isinstance(call, EncoderCall), call
        assert len(call.ids) == len(PROMPTS)
        assert not call.ids.equal(call.ids[:1].expand_as(call.ids))


@pytest.mark.parametrize("name", ["latte", "wan-vace"])
def test_the_encoder_of_a_pipeline_that_takes_one_prompt_at_a_time_gets_all_of_them(
    name: str, tmp_path: Path
):
    folder = save_tiny(PIPELINES[name].make, tmp_path / "source")
    source = source_of(default_recipe(str(folder)), RunOptions())
    call = record_call(source, "text_encoder", PROMPTS, usual_sampling(source).settings)
    assert isinstance(call, EncoderCall), call
    assert len(call.ids) == len(PROMPTS)


def test_what_can_not_be_run_gives_a_reason(tiny_flux: Path):
    source = source_of(default_recipe(str(tiny_flux)), RunOptions())
    found = record_call(source, "image_encoder", PROMPTS, usual_sampling(source).settings)
    assert isinstance(found, str)
    assert found.startswith("the pipeline")
