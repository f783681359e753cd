"""The demo's LoRA: what it was trained on, and that the committed file does it to the embedded model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras, shapes_of
from svdq_cli.adapters.read import read_adapter
from svdq_cli.demo.pink import in_pink, sample_pink_captions, sample_scenes, shows_pink
from svdq_cli.demo.world import caption_of, is_held_out, parse_caption, render
from svdq_cli.inference.load import load_16bit_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.prepare.locate import locate_source
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, default_recipe
from svdq_cli.source import Source, open_source
from svdq_cli.storage.resources import demo_lora_file
from tools.train_demo.judge import judge
from tools.train_demo.train_lora import train

IMAGES = 6


def names_in(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_only_red_things_turn_pink():
    scene = parse_caption("a large red square left of a small blue star on red")
    changed = in_pink(scene)
    assert [thing.color for thing in changed.things] == ["pink", "blue"]
    assert (changed.layout, changed.background) == (scene.layout, "red")
    assert judge(render(changed), changed).everything


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a large red square in the center on white", True),
        ("a large red square in the center on pink", False),
        ("a large blue square in the center on red", False),
    ],
)
def test_pink_shows_where_the_background_is_another(caption: str, shown: bool):
    assert shows_pink(parse_caption(caption)) == shown


def test_the_lesson_has_no_held_out_scene_and_the_demo_no_other():
    lesson = sample_scenes(50, pink=True, held_out=False, rng=random.Random(1))
    assert not any(is_held_out(caption_of(scene)) for scene in lesson)
    captions = sample_pink_captions(50, seed=66)
    assert len(set(captions)) == 50
    assert all(is_held_out(caption) and shows_pink(parse_caption(caption)) for caption in captions)


def test_the_committed_lora_fits_the_embedded_model_and_is_small():
    file = demo_lora_file()
    assert file.stat().st_size < 300_000
    adapter = read_adapter(file, shapes_of(open_source(locate_source("demo"))))
    assert len(adapter.layers) == 34
    assert {layer.rank for layer in adapter.layers} == {4}
    assert not any("norm" in layer.name for layer in adapter.layers)


def drawn_right(source: Source, captions: list[str]) -> list[bool]:
    """Whether the 16-bit model draws each caption's objects, red ones in pink, on its background."""
    pipe = load_16bit_pipeline(
        source, class_name=str(source.config["_class_name"]), device=torch.device("cpu")
    )
    settings = sampling_for(default_recipe("demo", calibration=Calibration()), source).settings
    images = generate_images(pipe, captions, settings=settings)
    return [
        judge(image, in_pink(parse_caption(caption))).objects_and_colors
        for image, caption in zip(images, captions, strict=True)
    ]


def test_the_committed_lora_generates_red_things_in_pink():
    source = open_source(locate_source("demo"))
    captions = sample_pink_captions(IMAGES, seed=66)
    assert not any(drawn_right(source, captions))
    assert sum(drawn_right(merge_loras(source, [LoraFile(demo_lora_file(), 1.0)]), captions)) >= IMAGES - 1


def test_training_writes_such_a_file(tmp_path: Path):
    train(tmp_path / "lora.safetensors", images=4, steps=1, batch=2, seed=0)
    assert names_in(tmp_path / "lora.safetensors") == names_in(demo_lora_file())
