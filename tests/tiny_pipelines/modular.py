"""Tiny pipelines that diffusers has as Modular Diffusers alone."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
from transformers import LlavaProcessor, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.tiny import LATENT_CHANNELS, TEXT_WIDTH, t5_tokenizer
from tests.tiny_families import PIPELINES as FAMILIES
from tests.tiny_parts import (
    FLAT_CHAT,
    WIDTH,
    byte_tokenizer,
    clip_images,
    clip_vision,
    flux2_vae,
    qwen3_vl,
    tiny_umt5,
    wan_vae,
)
from tests.tiny_pipelines import images


def assembled(pipeline_class: type[diffusers.ModularPipeline], **components: object) -> Any:
    """A modular pipeline of the class's own blocks with these components."""
    pipe: Any = pipeline_class()
    pipe.update_components(**components)
    return pipe


def _modular(
    pipeline_class: type[diffusers.ModularPipeline], make: Callable[[], Any], **configs: object
) -> Any:
    """A pipeline's parts in the modular one of the same model."""
    pipe: Any = pipeline_class()
    taken = {spec.name for spec in pipe.blocks.expected_components}
    parts = {name: part for name, part in make().components.items() if name in taken and part is not None}
    pipe.update_components(**parts, **configs)
    return pipe


OF_PLAIN: Mapping[str, Callable[[], Any]] = {
    "flux": partial(_modular, diffusers.FluxModularPipeline, images.tiny_flux),
    "sdxl": partial(_modular, diffusers.StableDiffusionXLModularPipeline, FAMILIES["sdxl"]),
    "sd3": partial(_modular, diffusers.StableDiffusion3ModularPipeline, FAMILIES["sd3"]),
    "qwen-image": partial(_modular, diffusers.QwenImageModularPipeline, FAMILIES["qwen-image"]),
    "z-image": partial(_modular, diffusers.ZImageModularPipeline, FAMILIES["z-image"]),
    "flux2-klein": partial(_modular, diffusers.Flux2KleinModularPipeline, FAMILIES["flux2"]),
    "ernie": partial(_modular, diffusers.ErnieImageModularPipeline, images.tiny_ernie),
}


def tiny_wan() -> Any:
    return _modular(diffusers.WanModularPipeline, FAMILIES["wan"])


def tiny_wan_2_2() -> Any:
    return _modular(diffusers.Wan22ModularPipeline, FAMILIES["wan-2.2"], boundary_ratio=0.875)


def tiny_flux3() -> Any:
    return assembled(diffusers.Flux3ModularPipeline, **_of_flux3(flow_map=False))


def tiny_flux3_distilled() -> Any:
    return assembled(diffusers.Flux3DistilledModularPipeline, **_of_flux3(flow_map=True))


def _of_flux3(*, flow_map: bool) -> dict[str, object]:
    tokenizer = byte_tokenizer()
    encoder = qwen3_vl(tokenizer, layers=_READ[-1])
    return {
        "text_encoder": encoder,
        "tokenizer": _processor(tokenizer),
        "vae": flux2_vae(),
        "transformer": diffusers.Flux3Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            cond_in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=len(_READ) * TEXT_WIDTH,
            axes_dims_rope=(16, 16, 16, 16),
            flow_map=flow_map,
        ),
    }


def _processor(tokenizer: Qwen2Tokenizer) -> LlavaProcessor:
    """In the place of Qwen3-VL's, which can't be made without torchvision: text alone goes through it."""
    # an empty prompt has a few tokens, too
    return LlavaProcessor(clip_images(), tokenizer, patch_size=56, chat_template=f"user:{FLAT_CHAT}")


_READ = (4, 8, 12, 16, 20, 24, 28, 32)  # the layers of the text encoder whose states FLUX.3 reads


def tiny_minimax_h3() -> Any:
    """A video with its sound, of five seconds at least; without `transformer_ref`, which runs with references alone."""
    tokenizer = byte_tokenizer()
    return assembled(
        diffusers.MiniMaxH3ModularPipeline,
        # it reads what comes after the fiftieth layer
        text_encoder=qwen3_vl(tokenizer, layers=51),
        tokenizer=tokenizer,
        processor=_processor(tokenizer),
        vae=diffusers.AutoencoderKLMiniMaxH3(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8, 8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=32,
            latents_mean=(0.0,) * LATENT_CHANNELS,
            latents_std=(1.0,) * LATENT_CHANNELS,
        ),
        audio_vae=diffusers.AutoencoderKLMiniMaxH3Audio(
            encoder_dim=4,
            encoder_rates=(2, 2),
            latent_dim=16,
            latent_channels=4,
            num_attention_heads=2,
            decoder_dim=16,
            decoder_rates=(2, 2),
            decoder_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),),
            sampling_rate=160,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=diffusers.MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            hidden_size=WIDTH,
            num_layers=1,
            num_refiner_layers=1,
            ffn_dim=2 * WIDTH,
            in_channels=LATENT_CHANNELS,
            audio_in_channels=4,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            time_embed_hidden_dim=WIDTH,
            time_embed_dim=WIDTH,
            rope_freq_dim=4,
        ),
        scheduler=diffusers.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(shift=3.0),
    )


def tiny_minimax_music3() -> Any:
    """A language model writes frames of sound, of which the denoiser makes latents."""
    tokenizer = byte_tokenizer()
    codebooks = 3
    return assembled(
        diffusers.MiniMaxMusic3ModularPipeline,
        tokenizer=tokenizer,
        language_model=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=_AUDIO_CODES + 16384,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                tie_word_embeddings=True,
            )
        ),
        rvq_depth_decoder=diffusers.MiniMaxMusic3RVQDepthDecoder(
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            audio_vocab_size=64,
            num_codebooks=codebooks,
        ),
        condition_encoder=diffusers.MiniMaxMusic3ConditionEncoder(
            condition_hidden_dim=32,
            num_condition_layers=codebooks,
            out_dim=WIDTH,
            # a frame in five seconds: its 60 have few
            input_hop_length=5 * 24000,
            output_sampling_rate=441,
        ),
        transformer=diffusers.MiniMaxMusic3Transformer1DModel(
            in_channels=8,
            condition_dim=WIDTH,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=64,
            ff_inner_dim=2 * WIDTH,
            fourier_embedding_dim=32,
        ),
        # time runs from noise at 0
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True),
        vocoder=diffusers.MiniMaxMusic3Vocoder(
            latent_channels=8,
            decoder_input_dim=16,
            decoder_hidden_dim=32,
            upsampling_ratios=(8, 8, 4, 2),
        ),
    )


_AUDIO_CODES = 151675  # the first token that is a code of sound


def tiny_wan_animate_2() -> Any:
    """A character, given as an image, moves as in a video."""
    tokenizer = t5_tokenizer()
    return assembled(
        diffusers.WanAnimate2ModularPipeline,
        text_encoder=tiny_umt5(tokenizer),
        tokenizer=tokenizer,
        image_encoder=clip_vision(width=1280),
        vae=wan_vae(
            dim_mult=[1, 1, 1, 1],
            temperal_downsample=[False, True, True],
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        ),
        transformer=diffusers.WanAnimate2Transformer3DModel(
            in_dim=2 * LATENT_CHANNELS + 4,
            out_dim=LATENT_CHANNELS,
            dim=WIDTH,
            ffn_dim=2 * WIDTH,
            freq_dim=32,
            text_dim=TEXT_WIDTH,
            num_heads=2,
            num_layers=1,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
