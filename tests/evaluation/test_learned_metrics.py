"""CLIP score on a tiny CLIP with random weights; what is missing is said with its cure, never counted as zero."""

# The annotations of transformers are narrower than what its classes take.
# pyright: reportArgumentType=false

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.evaluation.score import load_metrics
from svdq_cli.metrics import METRICS, Measured
from svdq_cli.metrics.clip import load_clip
from svdq_cli.metrics.fid import load_fid
from svdq_cli.metrics.metric import require_package, rgb_batch
from tests.tiny import clip_tokenizer

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a very long prompt " * 40)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    width = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**width, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**width, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def images() -> list[Image.Image]:
    gradient = Image.linear_gradient("L").resize((40, 48))
    return [Image.new("RGB", (40, 48), "red"), Image.merge("RGB", (gradient, gradient.rotate(180), gradient))]


def test_clip_score_is_100_times_the_cosine_of_the_two_projections(tiny_clip: Path):
    model: Any = CLIPModel.from_pretrained(tiny_clip).eval()
    processor = CLIPProcessor.from_pretrained(tiny_clip)
    expected: list[float] = []
    for image, prompt in zip(images(), PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(inputs.pixel_values).pooler_output)
            read = model.text_projection(model.text_model(inputs.input_ids).pooler_output)
        expected.append(max(0.0, 100 * torch.cosine_similarity(seen, read).item()))
    assert load_clip(CPU, model=str(tiny_clip))([Measured([], images(), PROMPTS)]) == pytest.approx(
        expected, abs=1e-3
    )
    assert max(expected) > 5  # and the other, below zero, is clamped
    assert min(expected) == 0


def test_an_image_has_the_same_clip_score_in_any_batch(tiny_clip: Path):
    score = load_clip(CPU, model=str(tiny_clip))
    alone = [
        score([Measured([], [image], [prompt])])[0] for image, prompt in zip(images(), PROMPTS, strict=True)
    ]
    assert score([Measured([], images(), PROMPTS)]) == pytest.approx(alone, abs=1e-3)
    assert all(0 <= figure <= 100 for figure in alone)


def test_missing_clip_weights_are_named_with_the_command_that_fetches_them():
    with pytest.raises(EnvironmentLacksError, match="openai/clip-vit-large-patch14") as caught:
        load_clip(CPU)
    assert caught.value.hint == "hf download openai/clip-vit-large-patch14"


def test_a_package_that_is_not_there_or_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EnvironmentLacksError, match="X needs the package no_such_package") as caught:
        require_package("no_such_package", metric="X", install="pip install it")
    assert caught.value.hint == "pip install it"
    (tmp_path / "built_for_another_torch.py").write_text("raise RuntimeError('no operator nms')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(EnvironmentLacksError, match="can't be imported: no operator nms"):
        require_package("built_for_another_torch", metric="X", install="pip install it")


def test_fid_of_few_images_is_no_figure():
    with pytest.raises(EnvironmentLacksError, match="FID of 64 images is meaningless"):
        load_fid(CPU, images=64)


def test_every_metric_is_measured_or_missing_with_a_cure():
    found = load_metrics(CPU, images=4)
    known = ["psnr_db", "ssim", "lpips", "clip", "image_reward", "fid"]
    assert [key for key in METRICS if key in known] == known  # more may come, none may go
    assert found.measures.keys() | found.missing.keys() == METRICS.keys()
    assert not found.measures.keys() & found.missing.keys()
    assert found.without_networks().measures.keys() == {
        key for key, metric in METRICS.items() if metric.always
    }
    assert {"psnr_db", "ssim"} <= found.without_networks().measures.keys()
    assert "hf download openai/clip" in found.missing["clip"]
    assert all("; " in why for why in found.missing.values())


def test_a_batch_has_the_images_pixels():
    batch = rgb_batch(images())
    assert batch.shape == (2, 3, 48, 40)
    assert batch[0, :, 5, 7].tolist() == [255, 0, 0]
    assert tuple(batch[1, :, 5, 7].tolist()) == images()[1].getpixel((7, 5))
