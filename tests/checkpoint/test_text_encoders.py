"""What becomes of every layer of a text encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.checkpoint.text_encoders import EncoderPlan, plan_encoder, plan_encoders
from svdq_cli.errors import InputError
from svdq_cli.source import text_encoders_of
from tests.tiny_encoders import ENCODERS, tiny_encoder


def planned(folder: Path) -> EncoderPlan:
    return plan_encoder(folder, "text_encoder", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_layers_of_all_text_blocks_get_4_bits(name: str, tmp_path: Path):
    plan = planned(tiny_encoder(name, tmp_path / name))
    assert len(plan.blocks) == 2
    in_blocks = [layer for layer in plan.layers if layer.block]
    assert len(in_blocks) == 12 if name.startswith(("T5", "CLIP")) else 10 if name.startswith("UMT5") else 14
    assert plan.bytes_after == sum(spec.bytes for spec in plan.specs.values())
    # 16 bits become 4 and an 8-bit scale for 64, and a little more
    saved = sum(layer.in_features * layer.out_features for layer in plan.layers) * (2 - 0.5 - 1 / 64)
    assert plan.bytes_before - saved < plan.bytes_after < plan.bytes_before - 0.95 * saved


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("T5EncoderModel", "encoder.block.0.layer.1.DenseReluDense.wo", "transformers keeps wo at 16 bits"),
        ("CLIPTextModelWithProjection", "text_projection", "is outside the blocks"),
        ("Qwen2_5_VLForConditionalGeneration", "model.visual.blocks.0.attn.qkv", "does not read text"),
        ("Qwen3ForCausalLM", "lm_head", "has no weights of its own"),
    ],
)
def test_what_stays_at_16_bits_has_its_reason(name: str, layer: str, reason: str, tmp_path: Path):
    assert planned(tiny_encoder(name, tmp_path / name)).kept[layer] == reason


def test_a_head_with_weights_of_its_own_gets_4_bits(tmp_path: Path):
    plan = planned(tiny_encoder("LlamaForCausalLM", tmp_path / "llama"))
    assert [layer.name for layer in plan.layers if layer.block is None] == ["lm_head"]


def test_a_width_that_64_does_not_divide_stays(tmp_path: Path):
    folder = tiny_encoder("LlamaForCausalLM", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 200}))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weights[name][:200].contiguous()
        elif "down_proj" in name:
            weights[name] = weights[name][:, :200].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert planned(folder).kept["model.layers.0.mlp.down_proj"] == "its width, 200, is not a multiple of 64"


def test_what_is_no_text_encoder_is_refused(tiny_flux: Path):
    assert text_encoders_of(tiny_flux) == ("text_encoder", "text_encoder_2")

    def plan(pipeline: Path | None, name: str) -> None:
        plan_encoders(pipeline, [name], dtype=torch.bfloat16, replaced={})

    with pytest.raises(InputError, match="there is no 'text_encoder_9'") as refused:
        plan(tiny_flux, "text_encoder_9")
    assert refused.value.hint == "name a text encoder of the pipeline: text_encoder, text_encoder_2"
    with pytest.raises(InputError, match="vae is no text encoder of transformers"):
        plan(tiny_flux, "vae")
    with pytest.raises(InputError, match="this is not a pipeline"):
        plan(None, "text_encoder_2")


def test_a_quantized_encoder_is_refused_by_name(tmp_path: Path):
    folder = tiny_encoder("T5EncoderModel", tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(InputError, match=r"already quantized \(gptq\)"):
        planned(folder)


def test_weights_of_another_size_than_the_config_says_are_refused(tmp_path: Path):
    folder = tiny_encoder("T5EncoderModel", tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    weights[name] = weights[name][:64].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"SelfAttention.q.weight is \(64, 128\), but the config describes"):
        planned(folder)


def test_tables_of_positions_stay_integers(tmp_path: Path):
    folder = tiny_encoder("CLIPTextModelWithProjection", tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert planned(folder).specs["text_model.embeddings.position_ids"].dtype == torch.int64
