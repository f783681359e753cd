"""The demo's LoRA: what it was trained on, and that the committed file is one of the embedded model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from svdq_cli.demo.pencil import LEADS, PAPER, render_in_pencil
from svdq_cli.demo.train_lora import train
from svdq_cli.demo.world import parse_caption
from svdq_cli.locate import locate_source
from svdq_cli.resources import demo_lora_file
from svdq_cli.source import open_source
from svdq_cli.source.adapters import read_adapter
from svdq_cli.source.merging import shapes_of


def names_in(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("color", ["red", "white"])
def test_pencil_draws_the_outline_only(color: str):
    scene = parse_caption(f"a large {color} square in the center on blue")
    pixels = np.asarray(render_in_pencil(scene)).astype(int)
    assert abs(pixels[48, 48] - PAPER).max() == 0  # the middle of the square
    assert abs(pixels[2, 2] - PAPER).max() == 0  # the background
    assert abs(pixels - LEADS[color]).sum(-1).min() < 10  # somewhere there is a line


def test_the_committed_lora_fits_the_embedded_model_and_is_small():
    file = demo_lora_file()
    assert file.stat().st_size < 300_000
    adapter = read_adapter(file, shapes_of(open_source(locate_source("demo"))))
    assert len(adapter.layers) == 34
    assert {layer.rank for layer in adapter.layers} == {4}
    assert not any("norm" in layer.name for layer in adapter.layers)


def test_training_writes_such_a_file(tmp_path: Path):
    train(tmp_path / "lora.safetensors", pictures=4, steps=1, batch=2, seed=0)
    assert names_in(tmp_path / "lora.safetensors") == names_in(demo_lora_file())
