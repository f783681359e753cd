"""A small config of every class of diffusers, with the modules of its own one: what `make pipelines` converts.

Two layers and two heads where a config counts them (`_LAYERS`, `_HEADS`); what else a class has to have smaller is in
`SMALLER`. Heads keep their width, which rotary positions are cut for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from svdq_cli.source.classes import empty_instance
from tools.model_class_facts import CONFIGS

_LAYERS = re.compile(
    r"num_\w*(layers|blocks)|\w*_layers|n_?layers|(dit_)?depth|mmdit_layers|num_stages|layers_per_block"
)
_HEADS = re.compile("(num_attention_|num_key_value_|num_kv_|num_|n_|n_kv_|dit_)?heads")

_UNET = {"block_out_channels": [128, 128, 256, 256], "layers_per_block": 1}
_SANA = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 128,
    "mlp_ratio": 2,
}
_JOY = {"hidden_size": 256, "text_dim": 256}
_LTX2 = {"cross_attention_dim": 256, "audio_num_attention_heads": 4, "audio_cross_attention_dim": 256}

SMALLER: Mapping[str, Mapping[str, Any]] = {
    "AceStepTransformer1DModel": {"hidden_size": 256, "intermediate_size": 512},
    "AllegroTransformer3DModel": {"num_attention_heads": 4, "cross_attention_dim": 384},
    "AuraFlowTransformer2DModel": {"caption_projection_dim": 512},
    "BriaFibo2Transformer2DModel": {
        "dim": 384,
        "n_heads": 3,
        "injection_layer_ids": [0, 1],
        "cap_feat_dim": 384,
    },
    "ChromaTransformer2DModel": {"approximator_hidden_dim": 256},
    "CogView3PlusTransformer2DModel": {"attention_head_dim": 64},
    "CogView4Transformer2DModel": {"attention_head_dim": 64},
    "Cosmos3OmniTransformer": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024},
    "DiTTransformer2DModel": {"attention_head_dim": 64},
    "DreamLiteUNetModel": {"block_out_channels": [128, 128, 256], "layers_per_block": 1},
    "ErnieImageTransformer2DModel": {"hidden_size": 256, "ffn_hidden_size": 512},
    "GlmImageTransformer2DModel": {"attention_head_dim": 64},
    "HiDreamImageTransformer2DModel": {"llama_layers": [0, 1, 2, 3]},
    "HunyuanDiT2DModel": {
        "attention_head_dim": 64,
        "hidden_size": 128,
        "cross_attention_dim": 128,
        "cross_attention_dim_t5": 128,
        "num_layers": 4,
    },
    "I2VGenXLUNet": {**_UNET, "cross_attention_dim": 128},
    "JoyImageEditPlusTransformer3DModel": _JOY,
    "JoyImageEditTransformer3DModel": _JOY,
    "Kandinsky3UNet": {
        "block_out_channels": [128, 128, 256, 256],
        "time_embedding_dim": 128,
        "cross_attention_dim": 128,
        "encoder_hid_dim": 128,
    },
    "Kandinsky5Transformer3DModel": {"model_dim": 256, "ff_dim": 512},
    "Kandinsky6Transformer3DModel": {"model_dim": 256, "ff_dim": 512},
    "Kandinsky6SRTransformer3DModel": {"model_dim": 256, "ff_dim": 512},
    "Krea2Transformer2DModel": {
        "intermediate_size": 512,
        "text_hidden_dim": 256,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 256,
    },
    "LTX2VideoTransformer3DModel": _LTX2,
    "LTXVideoTransformer3DModel": {"cross_attention_dim": 128},
    "LatteTransformer3DModel": {"attention_head_dim": 64, "cross_attention_dim": 128},
    "LongCatAudioDiTTransformer": {"dit_dim": 128, "dit_text_dim": 128},
    "Lumina2Transformer2DModel": {"hidden_size": 384, "num_attention_heads": 4, "num_kv_heads": 4},
    "LuminaNextDiT2DModel": {"hidden_size": 256, "num_attention_heads": 4},
    "MiniMaxH3Transformer3DModel": {
        "hidden_size": 256,
        "ffn_dim": 512,
        "text_dim": 256,
        "time_embed_hidden_dim": 256,
        "time_embed_dim": 256,
    },
    "MiniMaxMusic3RVQDepthDecoder": {"hidden_size": 256, "intermediate_size": 512},
    "MotionAdapter": {"block_out_channels": [128, 128, 256, 256], "motion_layers_per_block": 1},
    "OmniGenTransformer2DModel": {
        "hidden_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "pad_token_id": 0,
    },
    "PRXTransformer2DModel": {"hidden_size": 128, "context_in_dim": 256, "mlp_ratio": 4.0},
    "PixArtTransformer2DModel": {"attention_head_dim": 64, "cross_attention_dim": 128},
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA,
    "SanaWMLTX2RefinerTransformer3DModel": _LTX2,
    "SanaWMTransformer3DModel": {"hidden_size": 256, "linear_head_dim": 128, "image_size": 64},
    "StableAudio3DiTModel": {"embed_dim": 128},
    "StableCascadeUNet": {
        "block_out_channels": [256, 256],
        "num_attention_heads": [4, 4],
        "down_num_layers_per_block": [1, 1],
        "up_num_layers_per_block": [1, 1],
        "conditioning_dim": 256,
    },
    "TransformerTemporalModel": {"in_channels": 128, "attention_head_dim": 64},
    "UNet1DModel": {"block_out_channels": [128, 128, 256]},
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": {"block_out_channels": [128, 128, 256, 256]},
    "UNet3DConditionModel": {**_UNET, "cross_attention_dim": 128},
    "UNetMotionModel": {**_UNET, "cross_attention_dim": 128},
    "UNetSpatioTemporalConditionModel": {
        **_UNET,
        "num_attention_heads": [2, 2, 4, 4],
        "cross_attention_dim": 128,
    },
    "UVit2DModel": {
        "hidden_size": 256,
        "vocab_size": 1032,
        "codebook_size": 1024,
        "in_channels": 256,
        "block_out_channels": 256,
        "intermediate_size": 512,
    },
    "WanAnimate2Transformer3DModel": {"dim": 256, "ffn_dim": 512, "text_dim": 256},
    "WanAnimateTransformer3DModel": {"num_layers": 5},
    "WanVACETransformer3DModel": {"ffn_dim": 512, "vace_layers": [0, 1]},
    "ZImageTransformer2DModel": {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 256},
}


def own_config(name: str) -> dict[str, Any]:
    """The default config of a class, or that of a published model where the default lacks values."""
    given = dict(CONFIGS.get(name, {}))
    model = empty_instance(name, json.dumps(given), name)
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if key[0] != "_"}
    return {**json.loads(json.dumps(config)), **given}


def small_config(name: str) -> dict[str, Any]:
    """The same with fewer layers and heads, and what `SMALLER` says."""
    own = own_config(name)
    small = {key: min(value, 2) for key, value in own.items() if _counts(key, value)}
    return {**own, **small, **SMALLER.get(name, {})}


def _counts(key: str, value: Any) -> bool:
    counted = _LAYERS.fullmatch(key) or _HEADS.fullmatch(key)
    return counted is not None and isinstance(value, int) and not isinstance(value, bool)
