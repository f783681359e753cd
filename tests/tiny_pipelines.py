"""Tiny random pipelines of classes that svdq has no family file for: the library's own, small widths, random weights.

`make pipelines` runs all of them, with those of `tests/tiny_families.py`; `FAST` are those of the fast tests.
"""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable

import diffusers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.tiny import LATENT_CHANNELS, TEXT_WIDTH
from tests.tiny_families import WIDTH, byte_tokenizer

_FLAT_CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


def tiny_nucleus() -> diffusers.NucleusMoEImagePipeline:
    """A dense block, and one with experts whose middle width fits W4A16 layers only, as the published one's."""
    tokenizer = chat_tokenizer()
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(16, 24, 24),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=192,
        capacity_factors=2.0,
    )
    for name, weight in transformer.named_parameters():
        if ".experts." in name:  # of torch.empty
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return diffusers.NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=qwen_image_vae(),
        text_encoder=qwen3_vl(
            tokenizer, layers=8
        ),  # the pipeline reads the state eight layers before the end
        processor=tokenizer,
    )


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {"nucleus": tiny_nucleus}


# ------------------------------------------------------------------------------------------------- their parts


def qwen_image_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def chat_tokenizer() -> Qwen2Tokenizer:
    """In the place of Qwen3-VL's processor, which can't be made without torchvision; pipelines only give it text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = _FLAT_CHAT
    return tokenizer


def qwen3_vl(tokenizer: Qwen2Tokenizer, *, layers: int) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "rope_parameters": {"rope_type": "default", "mrope_section": [8, 4, 4], "rope_theta": 1e4},
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": TEXT_WIDTH,
                "deepstack_visual_indexes": [0],
            },
        )
    )
