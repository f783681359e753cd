"""Tiny pipelines whose text encoders read images too: transformers makes their processors where torchvision is
installed."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import diffusers
from transformers import Qwen2Tokenizer

from tests.tiny import LATENT_CHANNELS, TEXT_WIDTH, clip_tokenizer, t5_tokenizer, tiny_clip, tiny_t5, tiny_vae
from tests.tiny_families import PIPELINES
from tests.tiny_parts import (
    FLAT_CHAT,
    WIDTH,
    byte_tokenizer,
    euler,
    flux2_vae,
    hunyuan_vae,
    qwen2_5_vl,
    qwen3_vl,
    qwen_image_vae,
    wan_2_2_vae,
)

_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _tokenizer() -> Qwen2Tokenizer:
    """Bytes, and one token for each mark of a chat and of its images."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(_MARKS)})
    tokenizer.chat_template = FLAT_CHAT
    return tokenizer


def _reads(encoder: Any, tokenizer: Qwen2Tokenizer) -> Any:
    """An encoder that finds an image where the tokenizer marks one."""
    for mark in ("image", "video"):
        setattr(encoder.config, f"{mark}_token_id", tokenizer.convert_tokens_to_ids(f"<|{mark}_pad|>"))
    encoder.config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    return encoder


def _few_pixels(patch: int) -> dict[str, Any]:
    """Of an image, as a processor shows it to an encoder: two patches a side at the least, four at most."""
    return {
        "patch_size": patch,
        "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2},
    }


def _qwen3_processor(tokenizer: Qwen2Tokenizer) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_few_pixels(16)),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=FLAT_CHAT,
    )


def _qwen2_processor(tokenizer: Qwen2Tokenizer) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_few_pixels(14)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=FLAT_CHAT,
    )


def tiny_qwen_image_21() -> diffusers.QwenImage21Pipeline:
    tokenizer = _tokenizer()
    return diffusers.QwenImage21Pipeline(
        scheduler=euler(),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        ),
        text_encoder=_reads(qwen3_vl(tokenizer, layers=2), tokenizer),
        processor=_qwen3_processor(tokenizer),
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            context_in_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 24, 24),
        ),
    )


def tiny_qwen_image_edit() -> diffusers.QwenImageEditPipeline:
    tokenizer = _tokenizer()
    # 16 pixels a latent, since the pipelines scale images to an area of 1024 x 1024
    vae = qwen_image_vae(dim_mult=[1] * 5, temperal_downsample=[False] * 4)
    parts = {**PIPELINES["qwen-image-edit"]().components, "vae": vae}
    return diffusers.QwenImageEditPipeline(
        **{
            **parts,
            "text_encoder": _reads(qwen2_5_vl(tokenizer, layers=2), tokenizer),
            "tokenizer": tokenizer,
        },
        processor=_qwen2_processor(tokenizer),
    )


def tiny_qwen_image_edit_plus() -> diffusers.QwenImageEditPlusPipeline:
    return diffusers.QwenImageEditPlusPipeline(**tiny_qwen_image_edit().components)


def tiny_bria_fibo2() -> diffusers.BriaFibo2Pipeline:
    tokenizer = _tokenizer()
    return diffusers.BriaFibo2Pipeline(
        transformer=diffusers.BriaFibo2Transformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=3 * TEXT_WIDTH,
            injection_layer_ids=(0, 0, 1, 1, 1),
            perceiver_num_layers=1,
            axes_dims=(16, 24, 24),
        ),
        scheduler=euler(),
        vae=flux2_vae(),
        # the pipeline reads the states of layer 35 and of many before it
        text_encoder=_reads(qwen3_vl(tokenizer, layers=36), tokenizer),
        processor=_qwen3_processor(tokenizer),
    )


def _joy() -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "in_channels": 48,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "text_dim": TEXT_WIDTH,
        "num_layers": 1,
        "rope_dim_list": [16, 24, 24],
    }


def _of_joy() -> dict[str, Any]:
    tokenizer = _tokenizer()
    return {
        "scheduler": euler(),
        # 16 pixels a latent, since the pipelines scale to 1024
        "vae": wan_2_2_vae(),
        "text_encoder": _reads(qwen3_vl(tokenizer, layers=2), tokenizer),
        "tokenizer": tokenizer,
        "processor": _qwen3_processor(tokenizer),
    }


def tiny_joy_image_edit() -> diffusers.JoyImageEditPipeline:
    transformer = diffusers.JoyImageEditTransformer3DModel(**_joy())
    return diffusers.JoyImageEditPipeline(**_of_joy(), transformer=transformer)


def tiny_joy_image_edit_plus() -> diffusers.JoyImageEditPlusPipeline:
    transformer = diffusers.JoyImageEditPlusTransformer3DModel(**_joy())
    return diffusers.JoyImageEditPlusPipeline(**_of_joy(), transformer=transformer)


def tiny_kandinsky6() -> diffusers.Kandinsky6TI2VAPipeline:
    """A video with its sound: both are tokens of the same blocks."""
    tokenizer, tokenizer_2 = _tokenizer(), clip_tokenizer()
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=LATENT_CHANNELS,
            out_visual_dim=LATENT_CHANNELS,
            in_text_dim=TEXT_WIDTH,
            in_text_dim2=TEXT_WIDTH,
            time_dim=WIDTH,
            model_dim=WIDTH,
            ff_dim=2 * WIDTH,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(16, 24, 24),
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        vae=hunyuan_vae(),
        text_encoder=_reads(qwen2_5_vl(tokenizer), tokenizer),
        tokenizer=_qwen2_processor(tokenizer),
        text_encoder_2=tiny_clip(tokenizer_2),
        tokenizer_2=tokenizer_2,
        scheduler=euler(),
        audio_vae=diffusers.MMAudioVAE(
            mel_bins=8,
            latent_channels=4,
            hidden_channels=32,
            layers_per_block=1,
            sample_rate=8000,
            n_fft=64,
            hop_length=16,
        ),
        vocoder=diffusers.MMAudioVocoder(
            num_mels=8,
            upsample_initial_channel=16,
            upsample_rates=(4, 4),
            upsample_kernel_sizes=(8, 8),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
    )


def tiny_omnigen() -> diffusers.OmniGenPipeline:
    """Its transformer reads the prompt itself: there is no text encoder."""
    tokenizer = byte_tokenizer()
    return diffusers.OmniGenPipeline(
        transformer=diffusers.OmniGenTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            hidden_size=WIDTH,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=2 * WIDTH,
            num_layers=1,
            pad_token_id=0,
            vocab_size=len(tokenizer),
            time_step_dim=32,
            rope_scaling={
                "long_factor": [1.0] * 32,
                "short_factor": [1.0] * 32,
                "original_max_position_embeddings": 4096,
                "type": "su",
            },
        ),
        scheduler=euler(invert_sigmas=True, num_train_timesteps=1),
        vae=tiny_vae(4),  # eight pixels a latent, taken for granted
        tokenizer=tokenizer,
    )


def tiny_glm_image() -> diffusers.GlmImagePipeline:
    """A language model writes tokens of the image first, which the transformer then reads beside the text."""
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageImageProcessor,
        GlmImageProcessor,
    )

    tokenizer, codes = t5_tokenizer(), 64
    chat = byte_tokenizer(
        bos_token="<bos>",
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
    )
    encoder = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config={
                "vocab_size": codes + len(chat),
                "vision_vocab_size": codes,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "pad_token_id": 0,
                "eos_token_id": None,
                "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "image_size": 32,
                "patch_size": 16,
                "intermediate_size": 32,
            },
            vq_config={"embed_dim": 32, "num_embeddings": codes, "latent_channels": 32},
        )
    )
    return diffusers.GlmImagePipeline(
        tokenizer=tokenizer,
        processor=GlmImageProcessor(GlmImageImageProcessor(patch_size=16), chat, chat_template=FLAT_CHAT),
        text_encoder=tiny_t5(tokenizer),
        vision_language_encoder=encoder,
        vae=diffusers.AutoencoderKL(
            **{
                **tiny_vae(4).config,
                "latents_mean": [0.0] * LATENT_CHANNELS,
                "latents_std": [1.0] * LATENT_CHANNELS,
            }
        ),
        transformer=diffusers.GlmImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=WIDTH,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=codes,
        ),
        scheduler=euler(),
    )


def tiny_dreamlite() -> diffusers.DreamLitePipeline:
    tokenizer = _tokenizer()
    return diffusers.DreamLitePipeline(
        text_encoder=_reads(qwen3_vl(tokenizer, layers=2), tokenizer),
        tokenizer=tokenizer,
        processor=_qwen3_processor(tokenizer),
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(32, 32),
            decoder_block_out_channels=(32, 32),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=LATENT_CHANNELS,
        ),
        unet=diffusers.DreamLiteUNetModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(WIDTH, WIDTH),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            layers_per_block=1,
            norm_num_groups=8,
            transformer_layers_per_block=1,
        ),
        scheduler=euler(),
    )
