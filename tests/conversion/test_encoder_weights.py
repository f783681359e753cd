"""A text encoder to 4 bits: how near it stays, and that transformers reads it without svdq."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.checkpoint.nf4_layers import packed_weights, stored_config, stored_weight
from svdq_cli.checkpoint.text_encoders import EncoderPlan, plan_encoder
from svdq_cli.conversion.encoder_weights import Budget, EncoderFigures, budget_of, write_encoder
from svdq_cli.errors import InputError
from svdq_cli.pipelines.encoder_calls import EncoderCall
from tests.tiny_encoders import ENCODERS, tiny_call, tiny_call_with_images, tiny_encoder, tokens

CPU = torch.device("cpu")


def quantized(
    folder: Path, out: Path, call: EncoderCall | None, *, plain: bool = False
) -> tuple[EncoderPlan, EncoderFigures]:
    plan = plan_encoder(folder, "text_encoder", dtype=torch.bfloat16)
    out.mkdir(exist_ok=True)
    figures = write_encoder(out / "model.safetensors", plan, call, device=CPU, plain=plain)
    config = stored_config(json.loads((folder / "config.json").read_text()), plan.dtype, plan.kept)
    (out / "config.json").write_text(json.dumps(config))
    return plan, figures


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_of_other_prompts_stay_nearer_than_rounded_to_nearest(name: str, tmp_path: Path):
    folder = tiny_encoder(name, tmp_path / name)
    call = tiny_call(masked="T5" not in name)
    plan, ours = quantized(folder, tmp_path / "ours", call)
    _, plain = quantized(folder, tmp_path / "plain", call, plain=True)
    assert len(ours.hidden) == len(plain.hidden) == len(plan.blocks)
    # 3 to 9 dB after the last block, with random weights
    assert ours.hidden[-1] > plain.hidden[-1] + 2
    assert set(ours.layers) == {layer.name for layer in plan.layers}


@pytest.mark.parametrize("name", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_an_encoder_that_sees_images_is_rounded_for_what_it_sees(name: str, tmp_path: Path):
    """Held-out prompts with their images through both models whole, against the block by block figures."""
    import transformers

    folder = tiny_encoder(name, tmp_path / name)
    call = tiny_call_with_images()
    plan, ours = quantized(folder, tmp_path / "ours", call)
    blind, _ = quantized(folder, tmp_path / "blind", tiny_call())
    assert len(ours.hidden) == len(plan.blocks)
    held = call.taking(torch.arange(4))
    assert held.arguments["pixel_values"].shape[0] == 16 + 32 + 16 + 32
    exact = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    counted = held.token_weights() > 0

    def states(weights: dict[str, Tensor]) -> list[Tensor]:
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
        for key in packed_weights(weights):
            parameter = model.get_parameter(plan.parameters[key])
            parameter.data.copy_(stored_weight(key, weights).rows(slice(None)))
        return [each[counted] for each in model(**held.arguments, output_hidden_states=True).hidden_states]

    def error(weights: dict[str, Tensor]) -> float:
        first, second = reference[-1], states(weights)[-1]
        return float(10 * torch.log10(first.square().sum() / (first - second).square().sum()))

    with torch.no_grad():
        reference = [
            each[counted] for each in exact(**held.arguments, output_hidden_states=True).hidden_states
        ]
        seen, unseen = (load_file(tmp_path / each / "model.safetensors") for each in ("ours", "blind"))
        assert error(seen) > error(unseen)
    assert blind.blocks == plan.blocks


def test_images_are_taken_with_their_prompts():
    call = tiny_call_with_images(6)
    some = call.taking(torch.tensor([5, 0, 5]))
    starts = [0, 16, 48, 64, 96, 112, 144]
    pixels = call.arguments["pixel_values"]
    expected = torch.cat([pixels[112:144], pixels[:16], pixels[112:144]])
    assert torch.equal(some.arguments["pixel_values"], expected)
    assert some.arguments["image_grid_thw"].tolist() == [[1, 4, 8], [1, 4, 4], [1, 4, 8]]
    assert len(pixels) == starts[-1]


def test_the_figures_are_those_of_the_written_file(tmp_path: Path):
    """Held-out prompts through both models whole, in one go and not block by block."""
    from transformers import T5EncoderModel

    folder = tiny_encoder("T5EncoderModel", tmp_path / "t5")
    call = tiny_call(masked=False)
    _, figures = quantized(folder, tmp_path / "out", call)
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    held = {"input_ids": call.ids[:4]}
    with torch.no_grad():
        exact = model(**held, output_hidden_states=True).hidden_states
        stored = load_file(tmp_path / "out" / "model.safetensors")
        for name in packed_weights(stored):
            weight = stored_weight(name, stored).rows(slice(None))
            model.get_parameter(name).copy_(weight)
        rough = model(**held, output_hidden_states=True).hidden_states
    first = 10 * torch.log10(exact[1].square().sum() / (exact[1] - rough[1]).square().sum())
    assert float(first) == pytest.approx(figures.hidden[0], abs=0.01)


def test_without_prompts_every_layer_is_rounded_to_nearest(tmp_path: Path):
    _, figures = quantized(tiny_encoder("Gemma2Model", tmp_path / "gemma"), tmp_path / "out", None)
    assert not figures.calibrated
    assert not figures.hidden
    # NF4 of normal weights
    assert all(20 < sqnr < 22 for sqnr in figures.layers.values())


def test_too_little_memory_for_second_moments_rounds_to_nearest(tmp_path: Path):
    folder = tiny_encoder("LlamaForCausalLM", tmp_path / "llama")
    plan = plan_encoder(folder, "text_encoder", dtype=torch.bfloat16)
    call = tiny_call()
    little = Budget(8192, 24 * 128**2)  # for 128 inputs, not for 256
    figures = write_encoder(tmp_path / "little.safetensors", plan, call, device=CPU, budget=little)
    enough = write_encoder(tmp_path / "enough.safetensors", plan, call, device=CPU)
    down = "model.layers.0.mlp.down_proj"
    assert figures.layers[down] < enough.layers[down] - 1
    assert budget_of(plan, 1000) is None
    assert budget_of(plan, 10**9) is not None


def test_filling_tokens_count_as_much_as_the_prompt():
    ids = tokens(3)
    weights = EncoderCall({"input_ids": ids}).token_weights()
    assert torch.allclose(weights[:, :10].sum(1), torch.full((3,), 10.0))
    assert torch.allclose(weights[:, 10:].sum(1), torch.full((3,), 2.0))
    long = torch.cat([ids, torch.zeros(3, 60, dtype=torch.long)], 1)
    assert torch.allclose(
        EncoderCall({"input_ids": long}).token_weights()[:, 10:].sum(1), torch.full((3,), 10.0)
    )
    image = torch.cat(
        [ids[:, :4], torch.full((3, 90), 7), ids[:, 4:9]], 1
    )  # a place for an image in the middle
    assert float(EncoderCall({"input_ids": image}).token_weights()[:, 5:90].sum(1).max()) < 11
    masked = EncoderCall({"input_ids": ids, "attention_mask": (ids != 0).long()})
    assert torch.equal(masked.token_weights().sum(1), torch.full((3,), 9.0))
    assert masked.cropped().ids.shape == (3, 9)


def test_a_damaged_encoder_is_refused(tmp_path: Path):
    folder = tiny_encoder("T5EncoderModel", tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for call in (None, tiny_call(masked=False)):
        with pytest.raises(InputError, match=r"wi_0\.weight holds NaN"):
            quantized(folder, tmp_path / "out", call)
    assert not (tmp_path / "out" / "model.safetensors").exists()


_LOADS = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, info = getattr(transformers, folder.name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    four = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    ids = load_file(sys.argv[2])["ids"]
    with torch.no_grad():
        states = model.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    answer = {"layers": torch.tensor(len(four)), "states": states.float().contiguous()}
    save_file(answer, Path(sys.argv[3]) / folder.name)
assert "svdq_cli" not in sys.modules
"""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_transformers_loads_every_class_without_svdq(tmp_path: Path):
    import transformers

    made, ids = tmp_path / "made", tokens(2, seed=1)
    made.mkdir()
    plans = {name: quantized(tiny_encoder(name, tmp_path / name), made / name, None)[0] for name in ENCODERS}
    save_file({"ids": ids}, tmp_path / "ids")
    answers = tmp_path / "answers"
    answers.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-c", _LOADS, str(made), str(tmp_path / "ids"), str(answers)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=120)
    for name, plan in plans.items():
        answer = load_file(answers / name)
        states = answer["states"]
        assert int(answer["layers"]) == len(plan.layers)
        model = getattr(transformers, name).from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        stored = load_file(made / name / "model.safetensors")
        with torch.no_grad():
            for layer in plan.layers:
                model.get_submodule(layer.name).weight.copy_(
                    stored_weight(layer.tensor, stored).rows(slice(None))
                )
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        # bfloat16 there, float32 here
        assert float((states - expected).norm() / expected.norm()) < 0.02
