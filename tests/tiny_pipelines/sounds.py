"""Tiny pipelines that make sounds."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import diffusers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from tests.tiny import TEXT_WIDTH, t5_tokenizer, tiny_t5


def tiny_stable_audio() -> diffusers.StableAudioPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.StableAudioPipeline(
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
            sampling_rate=8000,
        ),
        text_encoder=tiny_t5(tokenizer),
        projection_model=StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, 0, 32),
        tokenizer=tokenizer,
        transformer=diffusers.StableAudioDiTModel(
            sample_size=64,
            in_channels=4,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=TEXT_WIDTH,
            time_proj_dim=32,
            global_states_input_dim=2 * TEXT_WIDTH,
            cross_attention_input_dim=TEXT_WIDTH,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
    )
