"""Tiny text encoders, tokenizers, autoencoders and schedulers of the libraries' own classes, of which tiny pipelines
are put together."""

# The annotations of diffusers and transformers are narrower than what their classes take.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import string

import diffusers
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import LATENT_CHANNELS, TEXT_WIDTH

WIDTH = 128  # hidden size of the denoisers
_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
FLAT_CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


def byte_tokenizer(**config: object) -> Qwen2Tokenizer:
    """Bytes only, no merges; a chat template that is nothing but the message."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=512, **config)
    tokenizer.chat_template = _CHAT
    return tokenizer


def qwen_image_vae(**config: object) -> diffusers.AutoencoderKLQwenImage:
    """A latent has two pixels a side."""
    return diffusers.AutoencoderKLQwenImage(
        **{
            "base_dim": 8,
            "z_dim": LATENT_CHANNELS,
            "dim_mult": [1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
            "latents_mean": [0.0] * LATENT_CHANNELS,
            "latents_std": [1.0] * LATENT_CHANNELS,
            **config,
        }
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


def tiny_gemma2(tokenizer: Qwen2Tokenizer, *, layers: int = 2) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=64,
            num_hidden_layers=layers,
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


def tiny_llama(tokenizer: Qwen2Tokenizer, *, vocabulary: int = 0) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(vocabulary, len(tokenizer)),
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


def euler(**config: object) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def qwen2_5_vl(tokenizer: Qwen2Tokenizer, *, layers: int = 1) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": TEXT_WIDTH,
                "fullatt_block_indexes": [0],
            },
        )
    )


def wan_vae(*, channels: int = LATENT_CHANNELS, **config: object) -> diffusers.AutoencoderKLWan:
    """A latent has two pixels a side, and two frames after the first."""
    return diffusers.AutoencoderKLWan(
        **{
            "base_dim": 8,
            "z_dim": channels,
            "dim_mult": [1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [True],
            "latents_mean": [0.0] * channels,
            "latents_std": [1.0] * channels,
            "scale_factor_temporal": 2,
            "scale_factor_spatial": 2,
            **config,
        }
    )


def wan_2_2_vae() -> diffusers.AutoencoderKLWan:
    """A latent has 16 pixels a side, and four frames after the first."""
    return wan_vae(
        channels=48,
        dim_mult=[1, 1, 1, 1],
        temperal_downsample=[False, True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )


def hunyuan_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    """A latent has eight pixels a side, and four frames after the first."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def clip_vision(
    *, projection: bool = False, width: int = TEXT_WIDTH
) -> CLIPVisionModel | CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    return CLIPVisionModelWithProjection(config) if projection else CLIPVisionModel(config)


def clip_images() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil()


def tiny_llama_model(tokenizer: Qwen2Tokenizer) -> LlamaModel:
    return LlamaModel(tiny_llama(tokenizer).config)


def kandinsky5() -> diffusers.Kandinsky5Transformer3DModel:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=LATENT_CHANNELS,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=TEXT_WIDTH,
        time_dim=WIDTH,
        out_visual_dim=LATENT_CHANNELS,
        model_dim=WIDTH,
        ff_dim=2 * WIDTH,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(16, 24, 24),
    )


def bert_tokenizer() -> BertTokenizer:
    """Letters only."""
    marks = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *marks]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=77)


def tiny_bert(tokenizer: BertTokenizer) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )


def movq(*, levels: int = 2, **config: object) -> diffusers.VQModel:
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        block_out_channels=(32,) * levels,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        num_vq_embeddings=16,
        vq_embed_dim=LATENT_CHANNELS,
        **{"norm_type": "spatial", "up_block_types": ("AttnUpDecoderBlock2D",) * levels, **config},
    )


def qwen2_vl(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
            },
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": TEXT_WIDTH, "num_heads": 2},
        )
    )


def t5gemma(tokenizer: Qwen2Tokenizer) -> T5GemmaEncoderModel:
    half = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False))


def t5gemma2(tokenizer: T5Tokenizer) -> T5Gemma2Encoder:
    """Its part for text: the one for images has no weights to read where a config names none."""
    return T5Gemma2Encoder(
        T5Gemma2EncoderConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "dropout_rate": 0.0,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 28,
                "patch_size": 14,
            },
        )
    )
