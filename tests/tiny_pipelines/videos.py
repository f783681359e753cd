"""Tiny pipelines that make videos."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import diffusers
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from tests.tiny import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_tokenizer,
    t5_tokenizer,
    tiny_clip,
    tiny_t5,
    tiny_vae,
)
from tests.tiny_families import tiny_wan
from tests.tiny_parts import (
    FLAT_CHAT,
    WIDTH,
    byte_tokenizer,
    clip_images,
    clip_vision,
    euler,
    hunyuan_vae,
    kandinsky5,
    qwen2_5_vl,
    qwen2_vl,
    t5gemma2,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama_model,
    wan_vae,
)


def tiny_cogvideox() -> diffusers.CogVideoXPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=WIDTH // 64,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            time_embed_dim=WIDTH,
            text_embed_dim=TEXT_WIDTH,
            num_layers=1,
            sample_width=16,
            sample_height=16,
            sample_frames=5,
            temporal_compression_ratio=2,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def tiny_ltx() -> diffusers.LTXPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=WIDTH // 64,
            attention_head_dim=64,
            cross_attention_dim=WIDTH,
            num_layers=1,
            caption_channels=TEXT_WIDTH,
        ),
    )


def tiny_wan_i2v() -> diffusers.WanImageToVideoPipeline:
    """It starts from an image, whose latents and mask are channels beside the video's."""
    parts = tiny_wan().components
    return diffusers.WanImageToVideoPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=parts["vae"],
        scheduler=parts["scheduler"],
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            # the video's, the image's, and a mask with a channel for each frame that a latent joins
            in_channels=2 * LATENT_CHANNELS + 2,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=2 * WIDTH,
            num_layers=1,
        ),
        # no image encoder, as Wan 2.2 has none
        boundary_ratio=None,
    )


def tiny_ltx_i2v() -> diffusers.LTXImageToVideoPipeline:
    return diffusers.LTXImageToVideoPipeline(**tiny_ltx().components)


def tiny_ltx2() -> diffusers.LTX2Pipeline:
    """A video with its sound: both are tokens of the same blocks."""
    tokenizer = byte_tokenizer()
    layers = 1
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            decoder_block_out_channels=(8,),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            upsample_type=("spatiotemporal",),
            patch_size=2,
        ),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            in_channels=2,
            output_channels=2,
            latent_channels=2,
            mel_bins=8,
        ),
        text_encoder=tiny_gemma3(tokenizer, layers=layers),
        tokenizer=tokenizer,
        connectors=LTX2TextConnectors(
            caption_channels=TEXT_WIDTH,
            text_proj_in_factor=layers + 1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=TEXT_WIDTH // 2,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=TEXT_WIDTH // 2,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            cross_attention_dim=WIDTH,
            audio_in_channels=2 * 2,
            audio_out_channels=2 * 2,
            audio_num_attention_heads=2,
            audio_attention_head_dim=WIDTH // 2,
            audio_cross_attention_dim=WIDTH,
            num_layers=1,
            caption_channels=TEXT_WIDTH,
            rope_double_precision=False,
        ),
        vocoder=LTX2Vocoder(
            in_channels=2 * 8,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=8000,
        ),
    )


def tiny_latte() -> diffusers.LattePipeline:
    tokenizer = t5_tokenizer()
    return diffusers.LattePipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        vae=tiny_vae(),
        transformer=diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            num_layers=1,
            cross_attention_dim=WIDTH,
            attention_bias=True,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=TEXT_WIDTH,
            video_length=2,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def tiny_skyreels() -> diffusers.SkyReelsV2Pipeline:
    parts = tiny_wan().components
    return diffusers.SkyReelsV2Pipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        transformer=diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=2 * WIDTH,
            num_layers=1,
        ),
        vae=parts["vae"],
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


def tiny_animatediff() -> diffusers.AnimateDiffPipeline:
    tokenizer = clip_tokenizer()
    widths = {"block_out_channels": (WIDTH, WIDTH)}
    return diffusers.AnimateDiffPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNetMotionModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=16,
            **widths,
        ),
        motion_adapter=diffusers.MotionAdapter(
            motion_layers_per_block=1,
            motion_norm_num_groups=8,
            motion_num_attention_heads=2,
            motion_max_seq_length=16,
            **widths,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def tiny_hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    tokenizer, tokenizer_2 = byte_tokenizer(), clip_tokenizer()
    return diffusers.HunyuanVideoPipeline(
        text_encoder=tiny_llama_model(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideoTransformer3DModel(**_HUNYUAN),
        vae=hunyuan_vae(),
        scheduler=euler(),
        text_encoder_2=tiny_clip(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )


_HUNYUAN = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "rope_axes_dim": (16, 24, 24),
}


def tiny_hunyuan_video_15() -> diffusers.HunyuanVideo15Pipeline:
    tokenizer, tokenizer_2 = byte_tokenizer(), t5_tokenizer()
    tokenizer.chat_template = FLAT_CHAT
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=qwen2_5_vl(tokenizer, layers=3).model.language_model,
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=2 * 32 + 1,
            out_channels=32,
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=TEXT_WIDTH,
            image_embed_dim=32,
            rope_axes_dim=(16, 24, 24),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=32,
            block_out_channels=(32, 32, 32, 32, 32),
            layers_per_block=1,
            scaling_factor=1.0,
        ),
        scheduler=euler(),
        text_encoder_2=tiny_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        guider=diffusers.ClassifierFreeGuidance(),
    )


def tiny_kandinsky5() -> diffusers.Kandinsky5T2VPipeline:
    tokenizer, tokenizer_2 = byte_tokenizer(), clip_tokenizer()
    return diffusers.Kandinsky5T2VPipeline(
        transformer=kandinsky5(),
        vae=hunyuan_vae(),
        text_encoder=qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(tokenizer_2),
        tokenizer_2=tokenizer_2,
        scheduler=euler(),
    )


def tiny_wan_vace() -> diffusers.WanVACEPipeline:
    return diffusers.WanVACEPipeline(
        **_of_wan(),
        transformer=diffusers.WanVACETransformer3DModel(
            **_WAN, num_layers=2, vace_layers=[0, 1], vace_in_channels=2 * LATENT_CHANNELS + 4
        ),
    )


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 2 * WIDTH,
}


def _of_wan(*names: str) -> dict[str, object]:
    parts = tiny_wan().components
    return {name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}


def tiny_wan_v2v() -> diffusers.WanVideoToVideoPipeline:
    return diffusers.WanVideoToVideoPipeline(
        **_of_wan(), transformer=diffusers.WanTransformer3DModel(**_WAN, num_layers=1)
    )


def tiny_chronoedit() -> diffusers.ChronoEditPipeline:
    return diffusers.ChronoEditPipeline(
        **_of_wan(),
        image_encoder=clip_vision(),
        image_processor=clip_images(),
        transformer=diffusers.ChronoEditTransformer3DModel(
            **{**_WAN, "in_channels": 2 * LATENT_CHANNELS + 2}, num_layers=1, image_dim=TEXT_WIDTH
        ),
    )


def tiny_anyflow() -> diffusers.AnyFlowPipeline:
    return diffusers.AnyFlowPipeline(
        **{**_of_wan(), "scheduler": diffusers.FlowMapEulerDiscreteScheduler()},
        transformer=diffusers.AnyFlowTransformer3DModel(**_WAN, num_layers=1),
    )


def tiny_allegro() -> diffusers.AllegroPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.AllegroPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        vae=diffusers.AutoencoderKLAllegro(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
            sample_size=32,
        ),
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=96,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=1,
            cross_attention_dim=4 * 96,
            sample_height=4,
            sample_width=4,
            sample_frames=2,
            caption_channels=TEXT_WIDTH,
        ),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )


def tiny_mochi() -> diffusers.MochiPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.MochiPipeline(
        scheduler=euler(),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=2,
            pooled_projection_dim=WIDTH,
            text_embed_dim=TEXT_WIDTH,
            max_sequence_length=16,
        ),
    )


def tiny_sana_video() -> diffusers.SanaVideoPipeline:
    tokenizer = byte_tokenizer()
    return diffusers.SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_gemma2(tokenizer),
        vae=wan_vae(),
        transformer=diffusers.SanaVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=4,
            attention_head_dim=32,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=64,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_WIDTH,
            mlp_ratio=2,
            sample_size=16,
        ),
        scheduler=euler(),
    )


def tiny_easyanimate() -> diffusers.EasyAnimatePipeline:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FLAT_CHAT
    return diffusers.EasyAnimatePipeline(
        vae=diffusers.AutoencoderKLMagvit(
            latent_channels=LATENT_CHANNELS,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_num_groups=2,
        ),
        text_encoder=qwen2_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            patch_size=2,
            sample_width=16,
            sample_height=16,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=WIDTH,
            text_embed_dim=TEXT_WIDTH,
            add_norm_text_encoder=True,
        ),
        scheduler=euler(),
    )


def tiny_svd() -> diffusers.StableVideoDiffusionPipeline:
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 2,
            block_out_channels=(32, 32),
            latent_channels=LATENT_CHANNELS,
        ),
        image_encoder=clip_vision(projection=True),
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=16,
            in_channels=2 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(WIDTH, WIDTH),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            num_attention_heads=(2, 2),
            num_frames=2,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
        feature_extractor=clip_images(),
    )


def tiny_modelscope() -> diffusers.TextToVideoSDPipeline:
    tokenizer = clip_tokenizer()
    return diffusers.TextToVideoSDPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        unet=diffusers.UNet3DConditionModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=64,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def tiny_anyflow_far() -> diffusers.AnyFlowFARPipeline:
    return diffusers.AnyFlowFARPipeline(
        **{
            **_of_wan(),
            "scheduler": diffusers.FlowMapEulerDiscreteScheduler(),
            "vae": wan_vae(
                dim_mult=[1, 1, 1],
                temperal_downsample=[True, True],
                scale_factor_temporal=4,
                scale_factor_spatial=4,
            ),
        },
        transformer=diffusers.AnyFlowFARTransformer3DModel(**_WAN, num_layers=1),
    )


def tiny_helios() -> diffusers.HeliosPipeline:
    return diffusers.HeliosPipeline(
        **{**_of_wan(), "scheduler": diffusers.HeliosScheduler(stages=1)},
        transformer=diffusers.HeliosTransformer3DModel(**_WAN, num_layers=1, rope_dim=(16, 24, 24)),
    )


def tiny_framepack() -> diffusers.HunyuanVideoFramepackPipeline:
    parts = tiny_hunyuan_video().components
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=56
    )
    return diffusers.HunyuanVideoFramepackPipeline(
        **{
            **parts,
            "transformer": diffusers.HunyuanVideoFramepackTransformer3DModel(
                **_HUNYUAN, has_image_proj=True, image_proj_dim=64, has_clean_x_embedder=True
            ),
        },
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessorPil(),
    )


def tiny_motif_video() -> diffusers.MotifVideoPipeline:
    tokenizer = t5_tokenizer()
    return diffusers.MotifVideoPipeline(
        scheduler=euler(shift=7.0),
        vae=wan_vae(),
        text_encoder=t5gemma2(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.MotifVideoTransformer3DModel(
            # the video's latents, those of a first image, and which frames have one
            in_channels=2 * LATENT_CHANNELS + 1,
            out_channels=LATENT_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=1,
            num_single_layers=1,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=TEXT_WIDTH,
            rope_axes_dim=(16, 24, 24),
        ),
        feature_extractor=None,
        guider=AdaptiveProjectedGuidance(),
    )
