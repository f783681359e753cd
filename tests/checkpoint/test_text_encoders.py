"""T5 encoders with 4-bit weights: small files that transformers loads by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from svdq_cli.checkpoint.text_encoders import (
    pack_words,
    quantize_encoder,
    require_encoders,
    unpack_words,
)
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError, UsageError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Output, Quantization, default_recipe

WO = "encoder.block.0.layer.1.DenseReluDense.wo"


@pytest.fixture
def encoder(tiny_flux_copy: Path) -> Path:
    return tiny_flux_copy / "text_encoder_2"


def test_words_unpack_to_their_codes():
    codes = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    assert torch.equal(unpack_words(pack_words(codes)), codes)


def test_words_are_those_of_compressed_tensors():
    library = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors")
    codes = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    assert torch.equal(pack_words(codes), library.pack_to_int32(codes, 4))


def test_transformers_loads_what_was_written(encoder: Path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    before = load_file(encoder / "model.safetensors")
    quantize_encoder(encoder, dtype=torch.bfloat16)
    after = load_file(encoder / "model.safetensors")
    assert after[f"{WO}.weight_packed"].shape == (128, 16)
    codes, scales = unpack_words(after[f"{WO}.weight_packed"]).float(), after[f"{WO}.weight_scale"].float()
    rebuilt = (codes.unflatten(1, (-1, 64)) * scales.unsqueeze(-1)).flatten(1)
    model = T5EncoderModel.from_pretrained(encoder, dtype=torch.float32)
    assert torch.equal(model.get_parameter(f"{WO}.weight"), rebuilt.to(torch.bfloat16).float())
    wanted = before[f"{WO}.weight"].float()
    assert (rebuilt - wanted).norm() < 0.15 * wanted.norm()  # 4 bits, nearest: 0.1 on normal weights
    assert torch.equal(model.get_parameter("shared.weight"), before["shared.weight"].float())


def test_a_pipeline_with_a_quantized_encoder_generates(tiny_flux: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    quantization = Quantization.model_validate({"effort": "datafree", "rank": 16})
    recipe = default_recipe(str(tiny_flux), quantization=quantization)
    recipe = recipe.model_copy(update={"components": {"text_encoder_2": "w4a16"}})
    convert(recipe, tmp_path / "out", options=RunOptions(device="cpu"))
    config = json.loads((tmp_path / "out/text_encoder_2/config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    pipe = load_pipeline(tmp_path / "out", device="cpu")
    settings = SamplingSettings(steps=1, guidance=1.0, height=32, width=32, seed=0, max_sequence_length=16)
    (image,) = generate_images(pipe, ["a red circle"], settings=settings)
    assert image.size == (32, 32)


def test_other_encoders_and_missing_ones_are_refused(tiny_flux: Path):
    with pytest.raises(InputError, match="text_encoder is a CLIPTextModel"):
        require_encoders(tiny_flux, ["text_encoder"])
    with pytest.raises(InputError, match="there is no 'text_encoder_9'"):
        require_encoders(tiny_flux, ["text_encoder_9"])
    with pytest.raises(InputError, match="this is not a pipeline"):
        require_encoders(None, ["text_encoder_2"])


def test_single_files_have_no_place_for_an_encoder(tiny_flux: Path):
    recipe = default_recipe(str(tiny_flux), outputs=[Output(format="nunchaku", path="out.safetensors")])
    with pytest.raises(UsageError, match="text_encoder_2 would be lost"):
        prepare(recipe.model_copy(update={"components": {"text_encoder_2": "w4a16"}}))


def test_a_damaged_encoder_is_refused_and_left_alone(encoder: Path):
    weights = load_file(encoder / "model.safetensors")
    weights[f"{WO}.weight"][0, 0] = float("nan")
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    config = (encoder / "config.json").read_text()
    with pytest.raises(InputError, match="NaN"):
        quantize_encoder(encoder, dtype=torch.bfloat16)
    assert (encoder / "config.json").read_text() == config
