"""Tiny pipelines that make images."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import diffusers
from diffusers.guiders import AdaptiveProjectedMixGuidance
from torch import nn
from transformers import CLIPTextModelWithProjection

from tests.tiny import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_tokenizer,
    t5_tokenizer,
    tiny_clip,
    tiny_t5,
    tiny_vae,
)
from tests.tiny_families import PIPELINES
from tests.tiny_parts import (
    FLAT_CHAT,
    WIDTH,
    bert_tokenizer,
    byte_tokenizer,
    chat_tokenizer,
    euler,
    flux2_vae,
    kandinsky5,
    movq,
    qwen2_5_vl,
    qwen3_vl,
    qwen_image_vae,
    tiny_bert,
    tiny_gemma2,
    tiny_llama,
    tiny_llama_model,
    tiny_qwen3,
    tiny_umt5,
    wan_2_2_vae,
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


def tiny_auraflow() -> diffusers.AuraFlowPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_umt5(tokenizer),
        vae=tiny_vae(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=256,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def tiny_lumina2() -> diffusers.Lumina2Pipeline:
    tokenizer = byte_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            hidden_size=WIDTH,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=128,
            axes_dim_rope=(16, 24, 24),
            axes_lens=(300, 64, 64),
            cap_feat_dim=TEXT_WIDTH,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(4),  # the pipeline takes eight pixels a latent for granted
        text_encoder=tiny_gemma2(tokenizer),
        tokenizer=tokenizer,
    )


def tiny_cogview3() -> diffusers.CogView3PlusPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.CogView3PlusPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        vae=tiny_vae(),
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=WIDTH,
            condition_dim=16,
            pos_embed_max_size=16,
            sample_size=16,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def tiny_ovis() -> diffusers.OvisImagePipeline:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FLAT_CHAT
    return diffusers.OvisImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            out_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 24, 24),
        ),
    )


def tiny_krea2() -> diffusers.Krea2Pipeline:
    tokenizer = chat_tokenizer()
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=qwen_image_vae(),
        text_encoder=qwen3_vl(tokenizer, layers=2).model,
        tokenizer=tokenizer,
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=2 * WIDTH,
            timestep_embed_dim=32,
            text_hidden_dim=TEXT_WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=WIDTH,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(16, 24, 24),
        ),
        text_encoder_select_layers=(1, 2),
    )


def tiny_hidream() -> diffusers.HiDreamImagePipeline:
    """Its experts are linear layers of their own, to which each token chooses the way."""
    tokenizer, tokenizer_3, tokenizer_4 = clip_tokenizer(), t5_tokenizer(), byte_tokenizer()
    clip = CLIPTextModelWithProjection(tiny_clip(tokenizer).config)
    return diffusers.HiDreamImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=clip,
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
        text_encoder_4=tiny_llama(tokenizer_4),
        tokenizer_4=tokenizer_4,
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
            text_emb_dim=2 * TEXT_WIDTH,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(32, 16, 16),
            max_resolution=(16, 16),
            llama_layers=(0, 1),
        ),
    )


def tiny_bria() -> diffusers.BriaPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=[16, 24, 24],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
    )


def tiny_cogview4() -> diffusers.CogView4Pipeline:
    tokenizer = t5_tokenizer()
    tokenizer.padding_side = "left"
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_llama_model(tokenizer),
        vae=tiny_vae(),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=WIDTH,
            condition_dim=16,
            sample_size=16,
            rope_axes_dim=(16, 16),
        ),
        scheduler=euler(use_dynamic_shifting=True),
    )


def tiny_hunyuan_image() -> diffusers.HunyuanImagePipeline:
    tokenizer, tokenizer_2 = byte_tokenizer(), t5_tokenizer()
    guidance = AdaptiveProjectedMixGuidance()
    return diffusers.HunyuanImagePipeline(
        scheduler=euler(),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=32,
            block_out_channels=(32, 64),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=32,
            scaling_factor=1.0,
        ),
        text_encoder=qwen2_5_vl(tokenizer, layers=3),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=TEXT_WIDTH,
            rope_axes_dim=(32, 32),
        ),
        guider=guidance,
        ocr_guider=guidance,
    )


def tiny_kandinsky5_t2i() -> diffusers.Kandinsky5T2IPipeline:
    tokenizer, tokenizer_2 = byte_tokenizer(), clip_tokenizer()
    return diffusers.Kandinsky5T2IPipeline(
        transformer=kandinsky5(),
        vae=tiny_vae(4),
        text_encoder=qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(tokenizer_2),
        tokenizer_2=tokenizer_2,
        scheduler=euler(),
    )


def tiny_ernie() -> diffusers.ErnieImagePipeline:
    tokenizer = byte_tokenizer()
    return diffusers.ErnieImagePipeline(
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=WIDTH,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=2 * WIDTH,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=4 * LATENT_CHANNELS,
            text_in_dim=TEXT_WIDTH,
            rope_axes_dim=(16, 24, 24),
        ),
        vae=flux2_vae(),
        text_encoder=tiny_llama_model(tokenizer),
        tokenizer=tokenizer,
        scheduler=euler(),
    )


def tiny_longcat() -> diffusers.LongCatImagePipeline:
    tokenizer = byte_tokenizer()
    return diffusers.LongCatImagePipeline(
        scheduler=euler(),
        vae=tiny_vae(channels=16),  # taken for granted
        text_encoder=qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        text_processor=tokenizer,
        transformer=diffusers.LongCatImageTransformer2DModel(
            in_channels=4 * 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=[16, 24, 24],
        ),
    )


def tiny_bria_fibo() -> diffusers.BriaFiboPipeline:
    tokenizer = byte_tokenizer()
    return diffusers.BriaFiboPipeline(
        transformer=diffusers.BriaFiboTransformer2DModel(
            in_channels=48,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            axes_dims_rope=[16, 24, 24],
            text_encoder_dim=TEXT_WIDTH,
        ),
        scheduler=euler(),
        vae=wan_2_2_vae(),
        # it asks for token 128000 where a prompt is empty
        text_encoder=tiny_llama(tokenizer, vocabulary=128001),
        tokenizer=tokenizer,
    )


def tiny_lumina() -> diffusers.LuminaPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            hidden_size=WIDTH,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=128,
            cross_attention_dim=TEXT_WIDTH,
        ),
        scheduler=euler(),
        vae=tiny_vae(4),
        text_encoder=tiny_gemma2(tokenizer),
        tokenizer=tokenizer,
    )


def tiny_prx() -> diffusers.PRXPipeline:
    tokenizer = byte_tokenizer()
    return diffusers.PRXPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            context_in_dim=TEXT_WIDTH,
            hidden_size=WIDTH,
            mlp_ratio=4.0,
            num_heads=2,
            depth=1,
            axes_dim=[32, 32],
        ),
        scheduler=euler(),
        text_encoder=tiny_gemma2(tokenizer),
        tokenizer=tokenizer,
        vae=tiny_vae(),
    )


def tiny_hunyuan_dit() -> diffusers.HunyuanDiTPipeline:
    tokenizer, tokenizer_2 = bert_tokenizer(), t5_tokenizer()
    return diffusers.HunyuanDiTPipeline(
        vae=tiny_vae(4),
        text_encoder=tiny_bert(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            patch_size=2,
            sample_size=16,
            hidden_size=WIDTH,
            num_layers=2,
            mlp_ratio=2.0,
            cross_attention_dim=TEXT_WIDTH,
            cross_attention_dim_t5=TEXT_WIDTH,
            pooled_projection_dim=WIDTH,
            text_len=77,
            text_len_t5=256,
        ),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=tiny_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )


def tiny_kandinsky3() -> diffusers.Kandinsky3Pipeline:
    tokenizer = t5_tokenizer()
    return diffusers.Kandinsky3Pipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        unet=diffusers.Kandinsky3UNet(
            in_channels=LATENT_CHANNELS,
            time_embedding_dim=WIDTH,
            groups=8,
            attention_head_dim=64,
            layers_per_block=2,
            block_out_channels=(WIDTH,) * 4,
            cross_attention_dim=WIDTH,
            encoder_hid_dim=TEXT_WIDTH,
        ),
        scheduler=diffusers.DDPMScheduler(),
        movq=movq(levels=4),
    )


def tiny_flux() -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(**PIPELINES["flux-kontext"]().components)


def tiny_chroma_i2i() -> diffusers.ChromaImg2ImgPipeline:
    return diffusers.ChromaImg2ImgPipeline(**PIPELINES["chroma"]().components)


def tiny_z_image_i2i() -> diffusers.ZImageImg2ImgPipeline:
    return diffusers.ZImageImg2ImgPipeline(**PIPELINES["z-image"]().components)


def tiny_amused() -> diffusers.AmusedPipeline:
    tokenizer = clip_tokenizer()
    return diffusers.AmusedPipeline(
        vqvae=movq(norm_type="group", lookup_from_codebook=True, up_block_types=("UpDecoderBlock2D",) * 2),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModelWithProjection(tiny_clip(tokenizer).config),
        transformer=diffusers.UVit2DModel(
            hidden_size=WIDTH,
            cond_embed_dim=TEXT_WIDTH,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=5 * 8,
            encoder_hidden_size=TEXT_WIDTH,
            vocab_size=24,
            codebook_size=16,
            in_channels=WIDTH,
            block_out_channels=WIDTH,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=WIDTH,
            sample_size=16,
        ),
        scheduler=diffusers.AmusedScheduler(mask_token_id=23),
    )


def tiny_ideogram4() -> diffusers.Ideogram4Pipeline:
    """Two transformers: one reads the prompt, the other none, which makes the guidance."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FLAT_CHAT

    def transformer() -> diffusers.Ideogram4Transformer2DModel:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            adaln_dim=WIDTH,
            llm_features_dim=13 * TEXT_WIDTH,
            mrope_section=(16, 8, 8),
        )

    return diffusers.Ideogram4Pipeline(
        scheduler=euler(),
        vae=flux2_vae(),
        # the pipeline reads the states of 13 layers, the last of them the 36th
        text_encoder=qwen3_vl(tokenizer, layers=36).model,
        tokenizer=tokenizer,
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )
