"""Wan 2.1 and 2.2."""

from __future__ import annotations

import math

from svdq_cli.source.configs.shapes import Facts, KnownClass, Shapes, blocks, size

_PATCHES = "patch_embedding.weight"
_IMAGE = "condition_embedder.image_embedder"
_HEAD = 128  # width of a head in every published model


def _wan_facts(tensors: Shapes) -> Facts:
    # A convolution (N, C, T, H, W), of which GGUF folds the first two axes
    shape = tensors[_PATCHES].shape if _PATCHES in tensors else ()
    patch, hidden = list(shape[-3:]), size(tensors, "blocks.0.attn1.to_q.weight", 0)
    return {
        "patch_size": patch,
        "num_attention_heads": hidden // _HEAD,
        "attention_head_dim": _HEAD,
        "in_channels": math.prod(shape[:-3]) // max(hidden, 1),
        "out_channels": size(tensors, "proj_out.weight", 0) // math.prod(patch or [1]),
        "text_dim": size(tensors, "condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": size(tensors, "condition_embedder.time_embedder.linear_1.weight", 1),
        "ffn_dim": size(tensors, "blocks.0.ffn.net.0.proj.weight", 0),
        "num_layers": blocks(tensors, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in tensors else None,
        "image_dim": size(tensors, f"{_IMAGE}.norm1.weight", 0) or None,
        "added_kv_proj_dim": size(tensors, "blocks.0.attn2.add_k_proj.weight", 1) or None,
        "pos_embed_seq_len": size(tensors, f"{_IMAGE}.pos_embed", -2) or None,
    }


def _wan_rest(facts: Facts) -> Facts | None:
    published = facts["text_dim"] == 4096 and facts["num_attention_heads"] in (12, 24, 40)
    return {"eps": 1e-6, "rope_max_seq_len": 1024} if published else None


WAN = KnownClass(
    "WanTransformer3DModel",
    "transformer",
    frozenset({"condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight", "scale_shift_table"}),
    _wan_facts,
    _wan_rest,
    frozenset({"num_layers"}),
    compared=frozenset({"in_channels", "out_channels", "text_dim", "ffn_dim"}),
    relatives=frozenset(
        {
            "ChronoEditTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "WanAnimateTransformer3DModel",
            "WanVACETransformer3DModel",
        }
    ),
)
