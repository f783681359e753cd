"""Pipelines with ways of their own: guidance by step, lists of images, sounds, what they ask a text encoder for."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.pipelines import generate
from svdq_cli.pipelines.arguments import optional_arguments
from svdq_cli.pipelines.batches import split_batches
from svdq_cli.pipelines.encode import FreedEncoder, encode_prompts
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings, image_files
from svdq_cli.source.whole import require_whole
from tests.tiny_families import save_tiny
from tests.tiny_pipelines.sounds import tiny_longcat_audio

SETTINGS = SamplingSettings(steps=4, guidance=None, height=32, width=64, seed=0)


def _arguments(
    pipeline: type[DiffusionPipeline], settings: SamplingSettings, images: range = range(1)
) -> dict[str, Any]:
    accepted = inspect.signature(pipeline.__call__).parameters
    return optional_arguments(settings, accepted=accepted, pipeline=pipeline.__name__, images=images)


def _settings(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{**{name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}, **changes})


def test_ideograms_schedule_of_guidance_is_spread_over_the_steps_that_are_asked_for():
    assert _arguments(diffusers.Ideogram4Pipeline, SETTINGS)["guidance_schedule"] == [7.0] * 4
    schedule = _arguments(diffusers.Ideogram4Pipeline, _settings(steps=48))["guidance_schedule"]
    assert schedule == [7.0] * 45 + [3.0] * 3, "the pipeline's own"
    assert (
        _arguments(diffusers.Ideogram4Pipeline, _settings(steps=96))["guidance_schedule"]
        == [7.0] * 90 + [3.0] * 6
    )


def test_one_guidance_for_all_steps_goes_alone():
    given = _arguments(diffusers.Ideogram4Pipeline, _settings(guidance=5.0))
    assert (given["guidance_scale"], given["guidance_schedule"]) == (5.0, None)


def test_a_prompt_enhancer_that_samples_is_off():
    """ERNIE-Image's writes other words each time: 16-bit and 4-bit images would be of different prompts."""
    assert inspect.signature(diffusers.ErnieImagePipeline.__call__).parameters["use_pe"].default is True
    assert _arguments(diffusers.ErnieImagePipeline, SETTINGS)["use_pe"] is False


def test_the_images_that_qwen_image_2_1_starts_from_have_the_area_that_is_asked_for():
    assert (
        _arguments(diffusers.QwenImage21Pipeline, _settings(height=64, width=144))["output_resolution"] == 96
    )


@pytest.mark.parametrize("name", ["GlmImagePipeline", "JoyImageEditPlusPipeline"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_each_prompt_has_a_list_of_its_images_where_the_pipeline_wants_one(
    name: str, prompts: int, image: Path
):
    settings = _settings(image=image_files(image))
    pipeline = getattr(diffusers, name)
    given = _arguments(pipeline, settings, range(prompts))
    read = given["image" if name.startswith("Glm") else "images"]
    assert [[one.size for one in each] for each in read] == [[(64, 32)]] * prompts


ALL_SEE_ALL = ["QwenImage21Pipeline", "QwenImageEditPlusPipeline", "Flux2Pipeline", "BriaFibo2Pipeline"]


@pytest.mark.parametrize("name", ALL_SEE_ALL)
def test_prompts_of_a_batch_see_no_other_prompts_image(name: str, image: Path, tmp_path: Path):
    """These pipelines take a list for several images of every prompt."""
    pipeline = getattr(diffusers, name)
    one = _arguments(pipeline, _settings(image=image_files(image)), range(2))["image"]
    assert one.size == (64, 32), "the one image of all prompts, alone"
    shutil.copy(image, tmp_path / "blue.png")
    settings = _settings(image=image_files(tmp_path))
    assert _arguments(pipeline, settings, range(1, 2))["image"].size == (64, 32)
    with pytest.raises(UsageError, match="shows every prompt of a batch the images of all") as caught:
        _arguments(pipeline, settings, range(2))
    assert "batch size of 1" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("pipeline", "asked"),
    [
        (diffusers.LongCatAudioDiTPipeline, "np"),  # it refuses all but numbers
        (diffusers.StableAudio3Pipeline, "pt"),
        (diffusers.FluxPipeline, "pil"),
        (diffusers.WanPipeline, "pil"),  # its own is "np"
    ],
)
def test_sounds_are_asked_for_in_the_form_that_the_pipeline_has(
    pipeline: type[DiffusionPipeline], asked: str
):
    accepted = inspect.signature(pipeline.__call__).parameters
    assert generate._output_type("pil", accepted) == asked
    assert generate._output_type("latent", accepted) == "latent"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (10, 10), "red").save(file := tmp_path / "red.png")
    return file


@pytest.fixture
def pipe(tiny_flux: Path) -> DiffusionPipeline:
    return load_source_pipeline(tiny_flux, dtype=torch.float32)


def test_a_pipeline_may_ask_a_text_encoder_that_is_gone_for_its_dtype(pipe: DiffusionPipeline):
    """As DreamLite does, of whose latents it is the dtype."""
    before: Any = cast(Any, pipe).text_encoder
    assert encode_prompts(pipe, split_batches(["a cat"], settings=SETTINGS), settings=SETTINGS) is not None
    freed = cast(Any, pipe).text_encoder
    assert isinstance(freed, FreedEncoder)
    assert (freed.dtype, freed.device, freed.config) == (before.dtype, before.device, before.config)


def test_text_encoders_stay_where_a_pipeline_calls_one_outside_of_its_method(
    pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
):
    check: Callable[..., Any] = type(pipe).check_inputs  # pyright: ignore[reportAttributeAccessIssue]

    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.text_encoder(torch.zeros(1, 4, dtype=torch.long))
        return check(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "check_inputs", look)
    assert encode_prompts(pipe, split_batches(["a cat"], settings=SETTINGS), settings=SETTINGS) is None
    assert isinstance(cast(Any, pipe).text_encoder, torch.nn.Module)


def test_a_scheduler_that_a_pipeline_makes_itself_is_no_missing_component(tmp_path: Path):
    """`save_pretrained` of LongCat's audio pipeline names its scheduler in the index, and writes none."""
    folder = save_tiny(tiny_longcat_audio, tmp_path / "pipeline")
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    require_whole(folder, skip=())
    assert cast(Any, load_source_pipeline(folder, dtype=torch.bfloat16)).scheduler is not None


_SAID = (
    "Qwen3VLVideoProcessor requires the Torchvision library but it was not found in your environment. Check"
)


@pytest.mark.parametrize(
    ("raised", "package"),
    [
        (ImportError(f"\n{_SAID} out the instructions"), "torchvision"),
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece"), "sentencepiece"),
    ],
)
def test_a_package_that_a_part_wants_is_named_with_its_cure(
    raised: Exception, package: str, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", refuse)
    with pytest.raises(EnvironmentLacksError, match=f"without the package {package}") as caught:
        load_source_pipeline(tiny_flux, dtype=torch.bfloat16)
    assert f"pip install {package}" in str(caught.value.hint)
