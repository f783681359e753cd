"""Tiny pipelines that make sounds."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import diffusers
from diffusers.pipelines.ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

from tests.tiny import TEXT_WIDTH, t5_tokenizer, tiny_t5
from tests.tiny_parts import WIDTH, byte_tokenizer, euler, t5gemma, tiny_qwen3, tiny_umt5


def tiny_stable_audio() -> diffusers.StableAudioPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.StableAudioPipeline(
        vae=oobleck(sampling_rate=8000),
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


def oobleck(*, sampling_rate: int) -> diffusers.AutoencoderOobleck:
    """A latent has four channels and eight samples."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        sampling_rate=sampling_rate,
    )


def tiny_stable_audio_3() -> diffusers.StableAudio3Pipeline:
    tokenizer = byte_tokenizer()
    return diffusers.StableAudio3Pipeline(
        transformer=diffusers.StableAudio3DiTModel(
            io_channels=8,
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            cond_token_dim=TEXT_WIDTH,
            global_cond_dim=TEXT_WIDTH,
            local_add_cond_dim=9,
            timestep_features_dim=32,
            ff_mult=2,
            num_memory_tokens=4,
        ),
        scheduler=euler(num_train_timesteps=1, stochastic_sampling=False),
        vae=diffusers.AutoencoderSAME(
            audio_channels=2,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        ),
        text_encoder=t5gemma(tokenizer),
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=TEXT_WIDTH, fourier_dim=32),
    )


def tiny_longcat_audio() -> diffusers.LongCatAudioDiTPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.LongCatAudioDiTPipeline(
        vae=diffusers.LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=64,
        ),
        text_encoder=tiny_umt5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.LongCatAudioDiTTransformer(
            dit_dim=WIDTH, dit_depth=2, dit_heads=2, dit_text_dim=TEXT_WIDTH, latent_dim=8
        ),
    )


def tiny_ace_step() -> diffusers.AceStepPipeline:
    """Its transformer reads prompt and lyrics, which one encoder joins, and tokens of a sound to start from."""
    tokenizer = byte_tokenizer()
    blocks = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 16,
    }
    sound = {"audio_acoustic_hidden_dim": 4, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}
    return diffusers.AceStepPipeline(
        vae=oobleck(sampling_rate=8),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.AceStepTransformer1DModel(
            **blocks, num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, patch_size=2
        ),
        condition_encoder=AceStepConditionEncoder(
            **blocks,
            text_hidden_dim=TEXT_WIDTH,
            timbre_hidden_dim=4,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        ),
        scheduler=euler(num_train_timesteps=1),
        audio_tokenizer=AceStepAudioTokenizer(
            **blocks, **sound, fsq_dim=WIDTH, fsq_input_levels=[4, 4, 4], fsq_input_num_quantizers=1
        ),
        audio_token_detokenizer=AceStepAudioTokenDetokenizer(**blocks, **sound),
    )
