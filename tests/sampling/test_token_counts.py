"""Tokens of layers and the memory of a forward pass, of real models at their real size, from configs alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from svdq_cli.families import find_family
from svdq_cli.planning.plan import take_inventory
from svdq_cli.sampling.token_counts import (
    TokenCounts,
    image_tokens,
    latent_frames,
    pixels_per_token,
    token_counts,
)
from svdq_cli.source import Source, open_source

CONFIGS = Path(__file__).parents[1] / "families" / "configs"
_LTX2_VAE: dict[str, object] = {
    "_class_name": "AutoencoderKLLTX2Video",
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def _source(folder: Path, component: str, config: dict[str, object], vae: dict[str, object]) -> Source:
    """A pipeline's denoiser and its autoencoder, without weights."""
    (folder / component).mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / component / "config.json").write_text(json.dumps(config))
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    return replace(open_source(folder / component / "config.json"), component=component, pipeline=folder)


def _counts(name: str, vae: dict[str, object], folder: Path, *, text: int | None = None) -> TokenCounts:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    source = _source(folder, "unet" if "unet" in name else "transformer", config, vae)
    inventory = take_inventory(source, find_family(source.config))
    return token_counts(source, inventory.linears, height=1024, width=1024, max_sequence_length=text)


def test_a_unets_levels_read_the_image_at_their_own_size(tmp_path: Path):
    counts = _counts("sdxl-base-unet", {"block_out_channels": [128, 256, 512, 512]}, tmp_path)
    tokens = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 64 * 64,
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": 32 * 32,
        "mid_block.attentions.0.transformer_blocks.3.attn1.to_q": 32 * 32,
        "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q": 32 * 32,
        "up_blocks.1.attentions.0.transformer_blocks.1.attn2.to_q": 64 * 64,
        "up_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": 77,
    }
    assert {name: counts.by_layer[name] for name in tokens} == tokens


def test_a_unets_widest_block_is_a_transformer_block_and_not_a_level(tmp_path: Path):
    counts = _counts("sdxl-base-unet", {"block_out_channels": [128, 256, 512, 512]}, tmp_path)
    assert "down_blocks.1.attentions.0.transformer_blocks.0" in counts.blocks
    # attn1 and attn2: 6 layers of 640 in and out, to_k and to_v of the text; ff: 640 -> 5120, 2560 -> 640
    block = 4096 * (6 * 1280 + 5760 + 3200) + 2 * 77 * (2048 + 640)
    maps = 4 * (128**2 * 320 + 64**2 * 640 + 32**2 * 1280)
    assert counts.forward_bytes(batch=1, itemsize=2) == 2 * (block + maps) + 4 * 4096 * 5120
    assert counts.forward_bytes(batch=3, itemsize=2) == 3 * counts.forward_bytes(batch=1, itemsize=2)


def test_text_streams_read_text_and_single_blocks_read_both(tmp_path: Path):
    vae = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
    counts = _counts("flux1-dev", vae, tmp_path, text=256)
    assert counts.by_layer["transformer_blocks.0.attn.to_q"] == 64 * 64
    assert counts.by_layer["transformer_blocks.0.ff_context.net.2"] == 256
    assert counts.by_layer["single_transformer_blocks.37.proj_out"] == 64 * 64 + 256


def test_cross_attention_reads_text_as_keys_and_values_alone(tmp_path: Path):
    counts = _counts(
        "pixart-sigma-xl2-1024", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}, tmp_path
    )
    block = "transformer_blocks.0"
    assert counts.by_layer[f"{block}.attn1.to_k"] == counts.by_layer[f"{block}.attn2.to_q"] == 64 * 64
    assert counts.by_layer[f"{block}.attn2.to_k"] == counts.by_layer[f"{block}.attn2.to_v"] == 512


def test_tokens_come_from_the_autoencoder_and_the_packing(tiny_flux: Path):
    source = open_source(tiny_flux)
    assert pixels_per_token(source) == 4  # the autoencoder halves, the pipeline packs two by two
    assert image_tokens(source, height=64, width=32) == 16 * 8


@pytest.mark.parametrize(
    ("config", "side"),
    [
        ({"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64}, 16),
        ({"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "in_channels": 128}, 16),
        ({"_class_name": "QwenImageTransformer2DModel", "patch_size": 2, "in_channels": 64}, 16),
        ({"_class_name": "PixArtTransformer2DModel", "patch_size": 2, "in_channels": 4}, 16),
    ],
)
def test_a_bare_config_is_counted_as_its_pipeline_would_pack_it(
    config: dict[str, object], side: int, tmp_path: Path
):
    """A 1024 x 1024 image of FLUX.1 has 4,096 tokens, not four times as many: time and memory follow from it."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pixels_per_token(open_source(tmp_path / "config.json")) == side


@pytest.mark.parametrize(
    ("vae", "seen"),
    [
        ({"temperal_downsample": [False, True, True]}, 21),  # AutoencoderKLWan: one frame, then four by four
        ({"temporal_compression_ratio": 4}, 21),  # AutoencoderKLCogVideoX
        ({}, 81),
    ],
)
def test_a_video_is_read_as_its_autoencoder_joins_frames(vae: dict[str, object], seen: int, tmp_path: Path):
    config: dict[str, object] = {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2]}
    source = _source(tmp_path, "transformer", config, vae)
    assert latent_frames(source, 81) == seen
    assert latent_frames(source, None) == 1
    assert pixels_per_token(source) == 16


def test_an_autoencoder_whose_config_leaves_its_ratios_open_is_asked(tmp_path: Path):
    """LTX joins 32 x 32 pixels and 8 frames, which only its class makes of the config; CogVideoX's model joins two of
    its latent frames more."""
    config: dict[str, object] = {"_class_name": "LTXVideoTransformer3DModel", "patch_size": 1}
    source = _source(tmp_path, "transformer", config, {"_class_name": "AutoencoderKLLTXVideo"})
    assert (pixels_per_token(source), latent_frames(source, 161)) == (32, 21)
    config = {"_class_name": "CogVideoXTransformer3DModel", "patch_size": 2, "patch_size_t": 2}
    vae: dict[str, object] = {"temporal_compression_ratio": 4, "block_out_channels": [128, 256, 256, 512]}
    source = _source(tmp_path / "other", "transformer", config, vae)
    assert (pixels_per_token(source), latent_frames(source, 81)) == (16, 11)


@pytest.mark.parametrize("said", [True, False])
def test_a_video_of_ltx2_has_the_latents_that_its_pipeline_prepares(said: bool, tmp_path: Path):
    """The config of LTX-2 says its ratios. Where one leaves them open, the pipeline takes the class's own word, which
    is 64 x 64 pixels and 16 frames, although the same encoder joins half as many."""
    vae = _LTX2_VAE if said else {"_class_name": _LTX2_VAE["_class_name"]}
    with torch.device("meta"):
        autoencoder = diffusers.AutoencoderKLLTX2Video.from_config(vae)
    others = ("audio_vae", "connectors", "scheduler", "text_encoder", "tokenizer", "transformer", "vocoder")
    pipe = diffusers.LTX2Pipeline(vae=autoencoder, **dict.fromkeys(others))  # pyright: ignore[reportArgumentType]
    prepared = pipe.prepare_latents(
        height=512, width=768, num_frames=49, dtype=torch.float32, device=torch.device("cpu")
    )
    source = _source(tmp_path, "transformer", {"_class_name": "LTX2VideoTransformer3DModel"}, vae)
    frames = latent_frames(source, 49)
    assert frames == (7 if said else 4)
    assert image_tokens(source, height=512, width=768) * frames == prepared.shape[1]


def test_sound_that_is_made_with_a_video_has_tokens_of_its_own(tmp_path: Path):
    """LTX-2: 25 latents a second, and two attentions in which sound and video read each other."""
    config: dict[str, object] = {
        "_class_name": "LTX2VideoTransformer3DModel",
        "num_layers": 1,
        "audio_sampling_rate": 16000,
        "audio_hop_length": 160,
        "audio_scale_factor": 4,
    }
    source = _source(tmp_path, "transformer", config, _LTX2_VAE)
    linears = take_inventory(source, None).linears
    found = token_counts(
        source, linears, height=512, width=768, frames=49, fps=24.5, max_sequence_length=100
    ).by_layer
    video, sound = 16 * 24 * 7, 50
    block = {
        name.removeprefix("transformer_blocks.0."): count
        for name, count in found.items()
        if name.startswith("transformer_blocks.0.")
    }
    assert {name for name, count in block.items() if count == sound} == {
        *(f"audio_attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"audio_attn2.{layer}" for layer in ("to_q", "to_out.0")),
        *(f"audio_to_video_attn.{layer}" for layer in ("to_k", "to_v")),
        *(f"video_to_audio_attn.{layer}" for layer in ("to_q", "to_out.0")),
        *(f"audio_ff.net.{layer}" for layer in ("0.proj", "2")),
    }
    assert {name for name, count in block.items() if count == 100} == {
        f"{attention}.{layer}" for attention in ("attn2", "audio_attn2") for layer in ("to_k", "to_v")
    }
    assert {count for name, count in block.items()} == {video, sound, 100}


def test_an_expert_reads_its_share_of_the_tokens(tmp_path: Path):
    """NucleusMoE-Image: each of 128 experts chooses a sixteenth of the image's tokens."""
    config: dict[str, object] = {
        "_class_name": "NucleusMoEImageTransformer2DModel",
        "num_layers": 5,
        "num_experts": 128,
        "capacity_factors": [8.0] * 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path / "config.json")
    tokens = image_tokens(source, height=1024, width=1024)
    found = token_counts(source, take_inventory(source, None).linears, height=1024, width=1024).by_layer
    experts = {name: count for name, count in found.items() if ".experts." in name}
    assert len(experts) == 2 * 128, "of the one block between three dense ones and the last"
    assert set(experts.values()) == {tokens // 16}
