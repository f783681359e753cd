"""Pipelines whose denoiser is an optional argument of their class (Wan, Lucy, Helios) take the one they are given."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest
import torch

from svdq_cli.pipelines.load import load_source_pipeline

DENOISERS = ("transformer", "transformer_2", "unet")


def optional_denoisers() -> dict[str, set[str]]:
    """Every pipeline class of diffusers that may lack a denoiser, and which."""
    found: dict[str, set[str]] = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline):
            named = set(kind._optional_components).intersection(DENOISERS)
            found |= {name: named} if named else {}
    return found


@pytest.fixture(scope="module")
def model() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
    )


def test_every_pipeline_with_an_optional_denoiser_takes_the_one_that_it_is_given(
    model: diffusers.WanTransformer3DModel, tmp_path: Path
):
    found = optional_denoisers()
    assert {"WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline"} <= found.keys()
    for name, denoisers in found.items():
        parts = diffusers.DiffusionPipeline._get_signature_keys(getattr(diffusers, name))[0]
        given = {part: model if part in denoisers else None for part in {*parts, *denoisers}}
        folder = tmp_path / name
        for denoiser in denoisers:
            model.save_pretrained(folder / denoiser)
        index = {
            part: ["diffusers", type(model).__name__] if value else [None, None]
            for part, value in given.items()
        }
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **index}))
        pipe = load_source_pipeline(folder, dtype=torch.float32, device=None, components=given)
        assert type(pipe).__name__ == name
        assert all(getattr(pipe, denoiser) is model for denoiser in denoisers), name
