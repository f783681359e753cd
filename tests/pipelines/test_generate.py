from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from svdq_cli.calibration import SamplingSettings, generate_images, load_source_pipeline
from svdq_cli.calibration.collect import _same
from svdq_cli.errors import EnvironmentLacksError, InputError, UsageError
from svdq_cli.pipelines.batches import split_batches
from svdq_cli.pipelines.generate import _image_of
from svdq_cli.pipelines.generated import Generated, answers_of
from svdq_cli.records import Event
from svdq_cli.storage.sounds import Sound

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from PIL.Image import Image

PROMPTS = ["a red circle", "two cats (sitting)", "a small blue square left of a large star"]
SETTINGS = SamplingSettings(steps=3, guidance=3.5, height=16, width=24, seed=5, max_sequence_length=24)


@pytest.fixture(scope="module")
def pipe(tiny_flux: Path) -> DiffusionPipeline:
    # float32: what batching changes in the last bit of a bfloat16 matmul would show in the pixels
    return load_source_pipeline(tiny_flux, dtype=torch.float32, device="cpu")


def _pixels(images: list[Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_images_are_neither_constant_nor_equal(pipe: DiffusionPipeline):
    pixels = _pixels(generate_images(pipe, PROMPTS, settings=SETTINGS))
    assert pixels.shape == (3, 16, 24, 3)
    assert all(image.std() > 10 for image in pixels)
    same_seed = _pixels(generate_images(pipe, PROMPTS, settings=SETTINGS, seeds=[1, 1, 1]))
    assert (same_seed[0] != same_seed[1]).any(), "the prompt has no effect"


def test_an_image_does_not_depend_on_its_batch(pipe: DiffusionPipeline):
    alone = _pixels(generate_images(pipe, PROMPTS, settings=SETTINGS))
    together = _pixels(generate_images(pipe, PROMPTS, settings=replace(SETTINGS, batch_size=2)))
    # 1 of 255: float32 matmuls of another batch size sum in another order, which can tip the rounding of a pixel
    assert np.abs(alone - together).max() <= 1


def test_the_same_seeds_give_the_same_image_bit_for_bit(pipe: DiffusionPipeline):
    first = _pixels(generate_images(pipe, PROMPTS[:1], settings=SETTINGS))
    assert (first == _pixels(generate_images(pipe, PROMPTS[:1], settings=SETTINGS, seeds=[5]))).all()
    assert (first != _pixels(generate_images(pipe, PROMPTS[:1], settings=SETTINGS, seeds=[6]))).any()


def test_true_guidance_changes_the_image(pipe: DiffusionPipeline):
    plain = _pixels(generate_images(pipe, PROMPTS[:1], settings=SETTINGS))
    guided = _pixels(generate_images(pipe, PROMPTS[:1], settings=replace(SETTINGS, true_cfg=4.0)))
    assert (plain != guided).any()


def test_events_count_images_times_steps(pipe: DiffusionPipeline):
    events: list[Event] = []
    steps: list[int] = []
    settings = replace(SETTINGS, batch_size=2)
    generate_images(
        pipe, PROMPTS, settings=settings, stage="eval", observe=events.append, on_step=steps.append
    )
    assert [(e.kind, e.done) for e in events] == [
        ("start", 0),
        *(("advance", done) for done in (2, 4, 6, 7, 8, 9)),
        ("end", 9),
    ]
    assert {(e.stage, e.total) for e in events} == {("eval", 9)}
    assert steps == [1, 2, 3, 1, 2, 3]


def test_a_pipeline_gets_only_the_arguments_it_takes():
    class Plain:
        def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator):
            from PIL.Image import new

            assert isinstance(prompt, str), "some pipelines take no lists"
            assert isinstance(generator, torch.Generator)
            return type("Out", (), {"images": [new("RGB", (24, 16))]})

    images = generate_images(Plain(), PROMPTS, settings=SETTINGS)  # type: ignore[arg-type]
    assert len(images) == 3
    with pytest.raises(UsageError, match="no true classifier-free guidance"):
        generate_images(Plain(), PROMPTS, settings=replace(SETTINGS, true_cfg=2.0))  # type: ignore[arg-type]


def test_a_size_that_the_pipeline_rounds_is_refused(pipe: DiffusionPipeline):
    with pytest.raises(UsageError, match="generates 16x16") as caught:
        generate_images(pipe, PROMPTS[:1], settings=replace(SETTINGS, height=18, width=18))
    assert "width 16 and height 16" in str(caught.value.hint)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"batch_size": 0}, {"height": -8}, {"seed": -1}, {"seed": 2**64}]
)
def test_settings_that_generate_nothing_are_refused(bad: dict[str, int]):
    with pytest.raises(UsageError, match=next(iter(bad))):
        replace(SETTINGS, **bad)


def test_loading_is_silent(tiny_flux: Path, capfd: pytest.CaptureFixture[str]):
    pipe = load_source_pipeline(tiny_flux, dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    generate_images(pipe, PROMPTS[:1], settings=SETTINGS)
    assert capfd.readouterr() == ("", "")


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "no model_index.json": lambda folder: (folder / "model_index.json").unlink(),
    "not readable JSON": lambda folder: (folder / "model_index.json").write_text("{"),
    "is not a pipeline of diffusers": lambda folder: _edit_index(folder, _class_name="FluxPipelineX"),
    "_class_name \\['pipe', 'Mine'\\] is not": lambda folder: _edit_index(
        folder, _class_name=["pipe", "Mine"]
    ),
    "runs no code from the folder": lambda folder: _edit_index(folder, transformer=["my_module", "Mine"]),
    "component 'scheduler' is missing": lambda folder: (folder / "scheduler").rename(folder / "x"),
    "it is truncated": lambda folder: _truncate(folder / "transformer/diffusion_pytorch_model.safetensors"),
    "pytorch_model.bin: this is a pickle": lambda folder: (folder / "text_encoder/model.safetensors").rename(
        folder / "text_encoder/pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_pipeline_folder_is_refused_with_a_cure(tiny_flux_copy: Path, says: str):
    DAMAGE[says](tiny_flux_copy)
    with pytest.raises(InputError, match=says) as caught:
        load_source_pipeline(tiny_flux_copy, dtype=torch.bfloat16)
    assert str(tiny_flux_copy) in caught.value.message
    assert caught.value.hint


def test_the_seed_after_the_largest_is_0(pipe: DiffusionPipeline):
    batches = split_batches(PROMPTS[:2], settings=replace(SETTINGS, seed=2**64 - 1, batch_size=2))
    assert [batch.seeds for batch in batches] == [(2**64 - 1, 0)]
    generate_images(pipe, PROMPTS[:2], settings=replace(SETTINGS, seed=2**64 - 1, steps=1))


def test_a_package_that_a_pipeline_lacks_is_named(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch):
    def clean(*_: object, **__: object) -> None:
        raise NameError("name 'ftfy' is not defined", name="ftfy")

    monkeypatch.setattr(type(pipe), "encode_prompt", clean)
    with pytest.raises(EnvironmentLacksError, match="needs the Python package ftfy") as refused:
        generate_images(pipe, PROMPTS[:1], settings=SETTINGS)
    assert refused.value.hint == "pip install ftfy"


def test_the_answer_of_a_pipeline_that_calls_its_images_an_image_is_read(pipe: DiffusionPipeline):
    """As Kandinsky 5's does."""
    assert answers_of(pipe, SimpleNamespace(image=["first", "second"])) == ["first", "second"]


def test_activations_that_are_no_numbers_are_not_said_to_differ():
    broken = torch.tensor([1.0, float("nan")])
    assert _same(broken, broken.clone())
    assert not _same(broken, torch.tensor([2.0, float("nan")]))


def test_a_pipeline_of_sounds_has_no_images_and_says_so(pipe: DiffusionPipeline):
    with pytest.raises(UsageError, match="makes sounds, not images"):
        _image_of(Generated((), Sound(torch.zeros(2, 8), 8000)), pipe)
