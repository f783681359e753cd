"""Layers that a pipeline runs only where it is given more than a prompt."""

from __future__ import annotations

from pathlib import Path

from svdq_cli.planning.idle import idle_layers
from svdq_cli.source.model import Source

LAYERS = (
    "mode_blocks.image.0.attn.to_q",
    "mode_blocks.image_cond.0.attn.to_q",
    "txt_mode_blocks.0.attn.to_q",
)


def of_class(name: str) -> Source:
    return Source(Path("model"), None, "transformer", {"_class_name": name}, {})


def test_what_reads_reference_images_stays_at_16_bits_unless_calibration_has_some():
    kept = idle_layers(of_class("Flux3Transformer2DModel"), LAYERS, given=())
    assert list(kept) == ["mode_blocks.image_cond.0.attn.to_q"]
    assert "give one as image in the recipe's calibration" in kept[LAYERS[1]]
    assert idle_layers(of_class("Flux3Transformer2DModel"), LAYERS, given={"image"}) == {}


def test_other_models_have_no_such_layers():
    assert idle_layers(of_class("Flux2Transformer2DModel"), LAYERS, given=()) == {}
