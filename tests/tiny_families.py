"""All that tests know of a model family: a tiny random pipeline, and how many of its layers become what.

A pipeline has the library's own classes, small widths and random weights.

Widths are the smallest that 4-bit layers take (128), one block a stack where a family allows it. Text comes from byte-
level tokenizers without merges, so that no vocabulary is downloaded.
"""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_tokenizer,
    t5_tokenizer,
    tiny_clip,
    tiny_flux_transformer,
    tiny_t5,
    tiny_vae,
)
from tests.tiny_parts import (
    WIDTH,
    byte_tokenizer,
    flux2_vae,
    qwen2_5_vl,
    qwen_image_vae,
    tiny_gemma2,
    tiny_umt5,
    wan_vae,
)


def tiny_pipeline(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes the tiny pipeline of that name (a key of `PIPELINES`) and returns its folder."""
    return save_tiny(PIPELINES[family], folder, seed=seed)


def save_tiny(make: Callable[[], diffusers.DiffusionPipeline], folder: Path, *, seed: int = 0) -> Path:
    """Writes a pipeline with random weights that keep the variance of what they read, and returns its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = make()
        for name in ("transformer", "transformer_2", "unet"):
            if (model := getattr(pipe, name, None)) is not None:
                _keep_variance(model)
    pipe.to(dtype=torch.bfloat16)
    modular = isinstance(pipe, diffusers.ModularPipeline)
    pipe.save_pretrained(str(folder), **({"overwrite_modular_index": True} if modular else {}))
    return folder


def _keep_variance(model: nn.Module) -> None:
    """torch's default keeps a third of the variance, so that deep activations would fade."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


# ------------------------------------------------------------------------------------------------- pipelines


def tiny_sdxl() -> diffusers.StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer()
    encoder_2 = CLIPTextModelWithProjection(tiny_clip(tokenizer_2).config)
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(tokenizer),
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            cross_attention_dim=2 * TEXT_WIDTH,
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def tiny_sd15() -> diffusers.StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=TEXT_WIDTH),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet(**config: object) -> diffusers.UNet2DConditionModel:
    """One plain and one attention level, so that stacks stand in down, middle and up blocks."""
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, WIDTH),
        layers_per_block=1,
        attention_head_dim=(1, 2),
        norm_num_groups=8,
        **config,
    )


def tiny_pixart() -> diffusers.PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        vae=tiny_vae(),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            num_layers=1,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_WIDTH,
            sample_size=16,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def tiny_sana_sprint() -> diffusers.SanaSprintPipeline:
    parts = tiny_sana(qk_norm="rms_norm_across_heads", guidance_embeds=True).components
    return diffusers.SanaSprintPipeline(**{**parts, "scheduler": diffusers.SCMScheduler()})


def tiny_sana(**config: object) -> diffusers.SanaPipeline:
    """`config`: what SANA 1.5 and SANA-Sprint have besides."""
    tokenizer = byte_tokenizer()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_gemma2(tokenizer, layers=1),
        vae=diffusers.AutoencoderDC(
            latent_channels=LATENT_CHANNELS,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=4,
            attention_head_dim=WIDTH // 4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=WIDTH // 2,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_WIDTH,
            mlp_ratio=2,
            sample_size=16,
            **config,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def tiny_sd3() -> diffusers.StableDiffusion3Pipeline:
    """Two blocks: the first with dual attention, the last without an end of the text stream."""
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    config = tiny_clip(tokenizer).config
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=WIDTH // 2,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer_2,
        text_encoder_3=tiny_t5(tokenizer_3, width=2 * TEXT_WIDTH),
        tokenizer_3=tokenizer_3,
    )


def tiny_qwen_image(*, zero_cond_t: bool = False) -> diffusers.QwenImagePipeline:
    """`zero_cond_t`: as in Qwen-Image-Edit 2511, whose image stream has a second conditioning vector."""
    tokenizer = byte_tokenizer()
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=qwen_image_vae(),
        text_encoder=qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 24, 24),
            zero_cond_t=zero_cond_t,
        ),
    )


def tiny_z_image() -> diffusers.ZImagePipeline:
    tokenizer = byte_tokenizer()
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=_qwen3(tokenizer, layers=1),
        tokenizer=tokenizer,
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=WIDTH * 3,  # the feed-forward network has 8/3 of it, which must be a multiple of 128
            n_layers=1,
            n_refiner_layers=1,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[16, 24, 24],
            axes_lens=[256, 64, 64],
        ),
    )


def tiny_flux2() -> diffusers.Flux2KleinPipeline:
    tokenizer = byte_tokenizer()
    # the pipeline reads the states after layers 9, 18 and 27
    encoder = _qwen3(tokenizer, layers=27, width=32)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=3 * 32,
            timestep_guidance_channels=32,
            axes_dims_rope=(16, 16, 16, 16),
            guidance_embeds=False,
        ),
    )


def tiny_flux_kontext() -> diffusers.FluxKontextPipeline:
    return diffusers.FluxKontextPipeline(
        transformer=tiny_flux_transformer(guidance_embeds=True), **_flux_parts()
    )


def tiny_flux_fill() -> diffusers.FluxFillPipeline:
    """Its denoiser also reads the latents of the masked picture and the mask, one channel a pixel of a latent."""
    mask = 4 * 2**2  # the 2x2 packing of the 2x2 pixels of a latent
    channels = 4 * LATENT_CHANNELS + 4 * LATENT_CHANNELS + mask
    transformer = tiny_flux_transformer(guidance_embeds=True, in_channels=channels)
    return diffusers.FluxFillPipeline(transformer=transformer, **_flux_parts())


def tiny_chroma() -> diffusers.ChromaPipeline:
    """Its modulation is computed by one small network for all blocks."""
    parts = _flux_parts()
    return diffusers.ChromaPipeline(
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        text_encoder=parts["text_encoder_2"],
        tokenizer=parts["tokenizer_2"],
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 24, 24),
            approximator_num_channels=64,
            approximator_hidden_dim=WIDTH,
            approximator_layers=2,
        ),
    )


def _flux_parts() -> dict[str, object]:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": tiny_vae(),
        "text_encoder": tiny_clip(tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": tiny_t5(tokenizer_2),
        "tokenizer_2": tokenizer_2,
    }


def tiny_wan(*, two: bool = False) -> diffusers.WanPipeline:
    """A video pipeline of a family that svdq has no file for. With two transformers, as Wan 2.2's, the first draws the
    steps above 0.7 of the noise; they differ in depth, so that no test takes one for the other."""
    tokenizer = t5_tokenizer()
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_umt5(tokenizer),
        vae=wan_vae(),
        transformer=_wan(),
        transformer_2=_wan(num_layers=1) if two else None,
        boundary_ratio=0.7 if two else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def _wan(*, num_layers: int = 2) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=2 * WIDTH,
        num_layers=num_layers,
    )


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sdxl": tiny_sdxl,
    "sd15": tiny_sd15,
    "pixart": tiny_pixart,
    "sana": tiny_sana,
    "sana-1.5": lambda: tiny_sana(qk_norm="rms_norm_across_heads"),
    "sana-sprint": tiny_sana_sprint,
    "sd3": tiny_sd3,
    "qwen-image": tiny_qwen_image,
    "qwen-image-edit": lambda: tiny_qwen_image(zero_cond_t=True),
    "z-image": tiny_z_image,
    "flux2": tiny_flux2,
    "chroma": tiny_chroma,
    "flux-kontext": tiny_flux_kontext,
    "flux-fill": tiny_flux_fill,
    "wan": tiny_wan,
    "wan-2.2": lambda: tiny_wan(two=True),
}

# W4A4, W4A16 and kept layers of the tiny pipeline of each family in nunchaku-lite
PLANNED = {
    "sdxl": (32, 0, 33),
    "sd15": (32, 0, 31),
    "pixart": (8, 0, 8),
    "sana": (6, 0, 11),
    "sd3": (25, 4, 7),
    "qwen-image": (12, 2, 6),
    "z-image": (21, 0, 8),
    "flux2": (14, 3, 6),
}
# Of the published models in tests/families/configs:
# W4A4 layers by block, W4A16 layers, kept ones (all linears less those, and 1x1 convolutions), published parameters
PUBLISHED = {
    "flux1-dev": (19 * 12 + 38 * 5, 19 * 2 + 38, 504 - 494, 11_901_408_320),
    "flux2-dev": (8 * 12 + 48 * 2, 3, 203 - 195, 32_223_281_152),
    "sdxl-base-unet": (70 * 8, 0, 743 - 560 + 11, 2_567_463_684),
    "sd15-unet": (16 * 8, 0, 184 - 128 + 46, 859_520_964),
    "sd35-large": (38 * 9 + 37 * 3, 38 * 2, 536 - 529, 8_056_627_520),
    "sd35-medium": (24 * 9 + 23 * 3 + 13 * 4, 24 * 2, 392 - 385, 2_243_171_520),
    "pixart-sigma-xl2-1024": (28 * 8, 0, 286 - 224, 610_856_096),
    "sana-600m-1024": (28 * (6 + 2), 0, 230 - 28 * 6 + 1, 591_747_872),
    "sana-1600m-1024": (20 * (6 + 2), 0, 166 - 20 * 6 + 1, 1_604_462_752),
    "qwen-image": (60 * 12, 60 * 2, 846 - 840, 20_430_401_088),
    "z-image-turbo": (34 * 7, 0, 276 - 238, 6_154_908_736),
}


# ------------------------------------------------------------------------------------------------- their parts


def _qwen3(tokenizer: Qwen2Tokenizer, *, layers: int, width: int = TEXT_WIDTH) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
