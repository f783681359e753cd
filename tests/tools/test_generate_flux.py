"""The folder that conversions are timed on is one that svdq converts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from svdq_cli.conversion.plan import predict
from svdq_cli.recipe import default_recipe
from tools.generate_flux import generate_flux


def test_a_generated_folder_is_a_flux_with_outliers_and_is_made_again_byte_for_byte(tmp_path: Path):
    for name in ("one", "two"):
        count = generate_flux(tmp_path / name, double=1, single=1, heads=1)
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    report = predict(default_recipe(str(tmp_path / "one")))
    assert report.model.family == "flux"
    assert report.model.parameters == count
    weight = load_file(tmp_path / "one" / file)["transformer_blocks.0.ff.net.0.proj.weight"].float()
    sizes = weight.norm(dim=0)
    assert sizes.max() > 8 * sizes.median()
    assert torch.isfinite(weight).all()
