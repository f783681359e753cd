"""Tiny random pipelines of classes that svdq has no family file for: the library's own, small widths, random weights.

`make pipelines` takes all of them from calibration to an image, with those of `tests/tiny_families.py`; the tests take
those that need no more than a few seconds (`FAST`).
"""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.reports import ConvertReport
from svdq_cli.source import open_source
from tests.tiny import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    clip_tokenizer,
    t5_tokenizer,
    tiny_clip,
    tiny_t5,
    tiny_vae,
)
from tests.tiny_families import PIPELINES as FAMILIES
from tests.tiny_families import WIDTH, byte_tokenizer, save_tiny, tiny_wan

FLAT_CHAT = (
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


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny pipeline, and what it can be sampled with."""

    make: Callable[[], diffusers.DiffusionPipeline]
    size: int = 32  # of its images, in pixels
    frames: int | None = None  # of its videos
    image: bool = False  # whether it starts from one


PIPELINES: Mapping[str, Tiny] = {
    "nucleus": Tiny(tiny_nucleus),
    "krea2": Tiny(tiny_krea2),
    "lumina2": Tiny(tiny_lumina2),
    "auraflow": Tiny(tiny_auraflow),
    "ovis": Tiny(tiny_ovis),
    "cogview3": Tiny(tiny_cogview3),
    "bria": Tiny(tiny_bria),
    "cogvideox": Tiny(tiny_cogvideox, frames=5),
    "ltx": Tiny(tiny_ltx, frames=9),
    "latte": Tiny(tiny_latte, frames=2),
    "wan-i2v": Tiny(tiny_wan_i2v, frames=5, image=True),
    "ltx-i2v": Tiny(tiny_ltx_i2v, frames=9, image=True),
    "ltx2": Tiny(tiny_ltx2, frames=9),
    # it draws images of one area
    "hidream": Tiny(tiny_hidream, size=256),
    "skyreels": Tiny(tiny_skyreels, frames=5),
    "animatediff": Tiny(tiny_animatediff, frames=2),
    **{name: Tiny(make) for name, make in FAMILIES.items() if not name.startswith(("wan", "flux-"))},
    "wan": Tiny(FAMILIES["wan"], frames=5),
    "wan-2.2": Tiny(FAMILIES["wan-2.2"], frames=5),
}
FAST = ("nucleus", "krea2", "lumina2", "auraflow", "ovis", "cogview3", "bria", "cogvideox", "ltx", "latte")


def round_trip(name: str, folder: Path) -> ConvertReport:
    """A tiny pipeline calibrated and converted, its checkpoint checked against it, loaded, and an image generated from
    it. Raises what goes wrong; AssertionError where the check finds something, or the image is of one color."""
    tiny, cpu = PIPELINES[name], RunOptions(device="cpu")
    source, out = save_tiny(tiny.make, folder / "source"), folder / "out"
    recipe = recipe_of(source, tiny)
    report = convert(recipe, out, options=cpu)
    assert check(out, against=open_source(source)).status == "ok"
    settings = sampling_for(recipe, open_source(source)).settings
    (image,) = generate_images(load_pipeline(out, device="cpu"), ["a red circle"], settings=settings)
    assert len(image.getcolors(maxcolors=image.width * image.height) or ()) > 1
    return report


def recipe_of(source: Path, tiny: Tiny) -> Recipe:
    """Two samples of two steps, calibrated as a user would."""
    prompts = source.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    image = source.parent / "first.png"
    Image.effect_noise((tiny.size, tiny.size), 60).save(image)
    calibration = Calibration(
        prompts=str(prompts),
        samples=2,
        steps=2,
        height=tiny.size,
        width=tiny.size,
        frames=tiny.frames,
        image=str(image) if tiny.image else None,
        max_sequence_length=16,
        rows=128,
    )
    quantization = Quantization.model_validate({"rank": 16, "smoothing": "closed-form"})
    return default_recipe(str(source), calibration=calibration, quantization=quantization)


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
    tokenizer.chat_template = FLAT_CHAT
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


def tiny_umt5(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            num_heads=2,
            num_layers=1,
            d_ff=64,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def tiny_gemma2(tokenizer: Qwen2Tokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def tiny_gemma3(tokenizer: Qwen2Tokenizer, *, layers: int) -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        )
    )


def tiny_qwen3(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_llama(tokenizer: Qwen2Tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
