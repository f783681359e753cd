"""What the default configs of diffusers' classes lack, and which layers of their blocks modulate, by their source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Arguments without which a class can't be built or called: those of a published model.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "DreamLiteTransformer2DModel": {
        "in_channels": 320,
        "num_attention_heads": 5,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 2,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "text_embed_dim": 3584,
        "num_layers": 48,
        "mmdit_layers": 48,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 20,
        "caption_channels": [4096, 4096],
        "text_emb_dim": 2048,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128],
        "llama_layers": [*range(32), *[31] * 16],
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 16,
        "attention_head_dim": 88,
        "in_channels": 4,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "sample_size": 128,
        "hidden_size": 1408,
        "num_layers": 40,
        "mlp_ratio": 4.3637,
        "learn_sigma": True,
    },
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "sample_size": 64,
        "patch_size": 2,
        "norm_type": "ada_norm_single",
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "video_length": 16,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {
            "long_factor": [1.0] * 48,
            "short_factor": [1.0] * 48,
            "original_max_position_embeddings": 4096,
            "type": "su",
        }
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "has_clean_x_embedder": True,
        "has_image_proj": True,
        "image_proj_dim": 1152,
    },
    "UNet1DModel": {"extra_in_channels": 64},
    # VQ-Diffusion's; other published models of this class are PixArt's and DiT's, which diffusers builds as such
    "Transformer2DModel": {
        "num_attention_heads": 16,
        "attention_head_dim": 64,
        "num_layers": 19,
        "cross_attention_dim": 512,
        "attention_bias": True,
        "sample_size": 32,
        "num_vector_embeds": 4097,
        "activation_fn": "geglu-approximate",
        "num_embeds_ada_norm": 100,
        "norm_type": "ada_norm",
    },
    "TransformerTemporalModel": {"in_channels": 320, "num_attention_heads": 8, "attention_head_dim": 40},
}

_ADA_NORMS = (
    "*.norm.linear",
    "*.norm1.linear",
    "*.norm1_context.linear",
    "*.norm2.linear",
    "*.norm3.linear",
    "*.norm_out.linear",
)

# Role -> patterns of full names. Layers of blocks that no pattern matches are W4A4.
EXPECTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "AuraFlowTransformer2DModel": {"w4a16": _ADA_NORMS},
    "BriaFiboTransformer2DModel": {"w4a16": _ADA_NORMS},
    "BriaTransformer2DModel": {"w4a16": _ADA_NORMS},
    "CogVideoXTransformer3DModel": {"w4a16": _ADA_NORMS},
    "CogView3PlusTransformer2DModel": {"w4a16": _ADA_NORMS},
    "CogView4Transformer2DModel": {"w4a16": _ADA_NORMS},
    "ConsisIDTransformer3DModel": {"w4a16": _ADA_NORMS},
    "EasyAnimateTransformer3DModel": {"w4a16": _ADA_NORMS},
    "FluxTransformer2DModel": {"w4a16": _ADA_NORMS},
    "GlmImageTransformer2DModel": {"w4a16": _ADA_NORMS},
    "HunyuanImageTransformer2DModel": {"w4a16": _ADA_NORMS},
    "HunyuanVideo15Transformer3DModel": {"w4a16": _ADA_NORMS},
    "HunyuanVideoFramepackTransformer3DModel": {"w4a16": _ADA_NORMS},
    "HunyuanVideoTransformer3DModel": {"w4a16": _ADA_NORMS},
    "LongCatImageTransformer2DModel": {"w4a16": _ADA_NORMS},
    "Lumina2Transformer2DModel": {"w4a16": _ADA_NORMS},
    "MotifVideoTransformer3DModel": {"w4a16": _ADA_NORMS},
    "OvisImageTransformer2DModel": {"w4a16": _ADA_NORMS},
    "SD3Transformer2DModel": {"w4a16": _ADA_NORMS},
    "HunyuanDiT2DModel": {"w4a16": ("*.norm1.linear",)},
    "LuminaNextDiT2DModel": {"w4a16": ("*.norm1.linear",)},
    "MochiTransformer3DModel": {"w4a16": (*_ADA_NORMS, "*.norm1_context.linear_1")},
    "Transformer2DModel": {"w4a16": _ADA_NORMS},
    "DiTTransformer2DModel": {"w4a16": ("*.norm1.linear", "*.norm1.emb.timestep_embedder.*")},
    "CosmosTransformer3DModel": {"w4a16": ("*.norm?.linear_?",)},
    "BriaFibo2Transformer2DModel": {"w4a16": ("*.adaLN_modulation.*",)},
    "HiDreamImageTransformer2DModel": {"w4a16": ("*.adaLN_modulation.*",)},
    "ZImageTransformer2DModel": {"w4a16": ("*.adaLN_modulation.*",)},
    "Ideogram4Transformer2DModel": {"w4a16": ("*.adaln_modulation",)},
    "ChromaTransformer2DModel": {"kept": ("distilled_guidance_layer.*",)},
    "Kandinsky3UNet": {"w4a16": ("*.context_mlp.*", "*.norm*.context_mlp.*")},
    "Kandinsky5Transformer3DModel": {"w4a16": ("*_modulation.out_layer",)},
    "Kandinsky6SRTransformer3DModel": {"w4a16": ("*_modulation.out_layer",)},
    "Kandinsky6Transformer3DModel": {"w4a16": ("*_modulation.out_layer",)},
    "MiniMaxH3Transformer3DModel": {"w4a16": ("*.adaln_proj.linear",)},
    "NucleusMoEImageTransformer2DModel": {
        # 1344 columns fit no W4A4 layer
        "w4a16": ("*.img_mod.*", "*.experts.down_proj.*"),
        "kept": ("*.img_mlp.gate",),
    },
    "QwenImageTransformer2DModel": {"w4a16": ("*.img_mod.*", "*.txt_mod.*")},
    "PRXTransformer2DModel": {"w4a16": ("*.modulation.lin",)},
    # FiLM layers scale and shift by the noise time
    "T5FilmDecoder": {"w4a16": ("*.scale_bias",)},
    # image embeddings, and pooled text, are a few vectors beside thousands of pixels
    "StableCascadeUNet": {"w4a16": ("*.mapper", "*.mapper_*", "*.kv_mapper.*")},
    # its cross-attention reads one image embedding
    "UNetSpatioTemporalConditionModel": {
        "w4a16": ("*.attn2.to_k", "*.attn2.to_v", "*.time_pos_embed.*", "*.time_emb_proj")
    },
    "UNetMotionModel": {"w4a16": ("*.time_emb_proj",)},
    "UNet3DConditionModel": {"w4a16": ("*.time_emb_proj",)},
    "I2VGenXLUNet": {"w4a16": ("*.time_emb_proj",)},
    "DreamLiteUNetModel": {"w4a16": ("*.time_emb_proj",)},
    "UNet2DModel": {"w4a16": ("*.time_emb_proj",)},
    "UNet2DConditionModel": {"kept": ("*.attn2.to_k", "*.attn2.to_v")},
    "UVit2DModel": {"w4a16": ("*.norm?.linear", "*.cond_embeds_mapper", "*.norm.linear")},
    # scale, shift and gate by a condition of each residue
    "RFD4ProteinaTransformer": {"w4a16": ("*.to_gamma.*", "*.to_beta", "*.scale_output.*")},
}

# Why no tiny pipeline of a class is taken through calibration
_NO_PIPELINE = "no pipeline of diffusers takes it"
_NO_TEXT = "its pipeline reads no text: svdq calibrates with prompts"
_GUARDRAIL = "its pipeline wants the package cosmos_guardrail, which downloads models"
WITHOUT_PIPELINE: Mapping[str, str] = {
    "ConsisIDTransformer3DModel": "its pipeline wants the packages consisid_eva_clip, insightface and facexlib",
    "Cosmos3OmniTransformer": _GUARDRAIL,
    "CosmosTransformer3DModel": _GUARDRAIL,
    "DiTTransformer2DModel": _NO_TEXT,
    "DreamLiteTransformer2DModel": _NO_PIPELINE,
    "I2VGenXLUNet": "its pipeline (deprecated) asks CLIPTextModel for what it has no more in transformers 5.6",
    "Kandinsky6SRTransformer3DModel": "its pipeline starts from videos and reads no text: svdq calibrates with prompts",
    "MiniMaxMusic3RVQDepthDecoder": "no denoiser: MiniMax Music 3 writes codes with it, one after the other, before it "
    "denoises; its pipeline keeps it at 16 bits",
    "MotionAdapter": "a part of UNetMotionModel, which is calibrated with it",
    "PriorTransformer": "its pipelines make embeddings, not images",
    "RFD4ProteinaTransformer": _NO_TEXT,
    "SanaWMLTX2RefinerTransformer3DModel": _NO_PIPELINE,
    "SanaWMTransformer3DModel": "its pipeline follows a camera's path, for which recipes have no key",
    "StableCascadeUNet": "its pipelines make embeddings, or start from them",
    "T5FilmDecoder": _NO_PIPELINE,
    "Transformer2DModel": "its pipeline (VQ-Diffusion, deprecated) can't be read from a folder in diffusers 0.42",
    "TransformerTemporalModel": "a part of other models",
    "UNet1DModel": _NO_TEXT,
    "UNet2DModel": _NO_TEXT,
    "WanAnimateTransformer3DModel": "its pipeline starts from videos of pose and face: recipes have no key for them",
}
