"""Tiny real models for tests: every class is the library's own, only the widths are small and the weights random."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false

from __future__ import annotations

import string
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

HEAD = 64  # width of an attention head
TEXT_WIDTH = 128  # of both text encoders
LATENT_CHANNELS = 4
PIXELS_PER_TOKEN = 4  # a side: the autoencoder halves, the 2x2 packing halves again


def tiny_flux_pipeline(
    folder: Path,
    *,
    seed: int = 0,
    double: int = 1,
    single: int = 1,
    hidden: int = 128,
    guidance_embeds: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes a complete FluxPipeline folder with random weights and returns it. `hidden` is a multiple of 64.

    The same arguments give the same weights. Pictures are noise, but neither constant nor NaN.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=tiny_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=tiny_flux_transformer(
                double=double, single=single, hidden=hidden, guidance_embeds=guidance_embeds
            ),
        )
    pipe.to(dtype=dtype)
    pipe.save_pretrained(folder)
    return folder


def tiny_flux_transformer(
    *,
    double: int = 1,
    single: int = 1,
    hidden: int = 128,
    guidance_embeds: bool = False,
    in_channels: int = 4 * LATENT_CHANNELS,
) -> FluxTransformer2DModel:
    """float32, freshly drawn from torch's global generator."""
    model = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=4 * LATENT_CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=hidden // HEAD,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(16, 24, 24),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # torch's default keeps a third of the variance, so that deep activations would fade
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def tiny_vae(levels: int = 2, *, channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """One latent has 2^(levels - 1) pixels on each side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16,) * levels,
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def tiny_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_t5(tokenizer: T5Tokenizer, *, width: int = TEXT_WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            num_heads=2,
            num_layers=1,
            d_ff=128,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes only, no merges. The end token has the highest id, where CLIP's pooling looks for it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{mark}</w>" for mark in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Characters of printable ASCII only."""
    marks = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((mark, -2.0) for mark in marks)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
