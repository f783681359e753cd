"""Qwen-Image, SD3, SANA, Z-Image and PixArt."""

from __future__ import annotations

from svdq_cli.source.configs.shapes import Facts, KnownClass, Shapes, blocks, heads, size
from svdq_cli.source.names import block_numbers


def _qwen_facts(tensors: Shapes) -> Facts:
    return {
        "in_channels": size(tensors, "img_in.weight", 1),
        "out_channels": size(tensors, "proj_out.weight", 0) // 4,  # pixels of a 2x2 patch
        "num_layers": blocks(tensors, "transformer_blocks"),
        **heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": size(tensors, "txt_in.weight", 1),
    }


def _qwen_rest(facts: Facts) -> Facts | None:
    published = facts["attention_head_dim"] == 128
    return {"patch_size": 2, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56]} if published else None


def _sd3_facts(tensors: Shapes) -> Facts:
    positions = size(tensors, "pos_embed.pos_embed", -2)  # GGUF drops the first axis, which is 1
    dual = block_numbers([n for n in tensors if ".attn2." in n], "transformer_blocks.{}")
    hidden = size(tensors, "context_embedder.weight", 0)
    return {
        "in_channels": size(tensors, "pos_embed.proj.weight", 1),
        "out_channels": size(tensors, "proj_out.weight", 0) // 4,  # pixels of a 2x2 patch
        "num_layers": blocks(tensors, "transformer_blocks"),
        "attention_head_dim": 64,
        "num_attention_heads": hidden // 64,
        "joint_attention_dim": size(tensors, "context_embedder.weight", 1),
        "caption_projection_dim": hidden,
        "pooled_projection_dim": size(tensors, "time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": round(positions**0.5),
        "dual_attention_layers": list(dual),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in tensors else None,
    }


def _sd3_rest(facts: Facts) -> Facts | None:
    published = facts["joint_attention_dim"] == 4096 and facts["pooled_projection_dim"] == 2048
    return {"patch_size": 2, "sample_size": 128} if published else None


def _sana_facts(tensors: Shapes) -> Facts:
    hidden = size(tensors, "patch_embed.proj.weight", 0)
    mlp = size(tensors, "transformer_blocks.0.ff.conv_point.weight", 1)
    return {
        "in_channels": size(tensors, "patch_embed.proj.weight", 1),
        "out_channels": size(tensors, "proj_out.weight", 0),
        "num_layers": blocks(tensors, "transformer_blocks"),
        "attention_head_dim": 32,
        "num_attention_heads": hidden // 32,
        "cross_attention_dim": size(tensors, "transformer_blocks.0.attn2.to_q.weight", 0),
        "caption_channels": size(tensors, "caption_projection.linear_1.weight", 1),
        "mlp_ratio": mlp / hidden if hidden else 0.0,
        "guidance_embeds": any(name.startswith("time_embed.guidance_embedder") for name in tensors),
        "qk_norm": "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in tensors else None,
    }


_SANA_CROSS_HEADS = {1152: (16, 72), 2240: (20, 112)}  # SANA 0.6B and 1.6B: heads, width of one


def _sana_rest(facts: Facts) -> Facts | None:
    heads = _SANA_CROSS_HEADS.get(int(str(facts["cross_attention_dim"])))
    if heads is None:
        return None
    return {
        "num_cross_attention_heads": heads[0],
        "cross_attention_head_dim": heads[1],
        "dropout": 0.0,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
    }


# SANA's images of 2K and 4K: latents a side -> how far positions are apart. Smaller ones have none.
_SANA_POSITIONS = {64: 1.0, 128: 2.0}


def _sana_positions(original: Shapes) -> Facts:
    side = round(size(original, "pos_embed", 1) ** 0.5)
    if side in _SANA_POSITIONS:
        return {"interpolation_scale": _SANA_POSITIONS[side], "sample_size": side}
    return {"interpolation_scale": None} if side else {}


def _z_image_facts(tensors: Shapes) -> Facts:
    return {
        "in_channels": size(tensors, "all_x_embedder.2-1.weight", 1) // 4,  # pixels of a 2x2 patch
        "dim": size(tensors, "all_x_embedder.2-1.weight", 0),
        "n_layers": blocks(tensors, "layers"),
        "n_refiner_layers": blocks(tensors, "context_refiner"),
        "cap_feat_dim": size(tensors, "cap_embedder.0.weight", 0),
    }


def _z_image_rest(facts: Facts) -> Facts | None:
    if facts["dim"] != 3840:
        return None
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }


def _pixart_facts(tensors: Shapes) -> Facts:
    return {
        "in_channels": size(tensors, "pos_embed.proj.weight", 1),
        "out_channels": size(tensors, "proj_out.weight", 0) // 4,  # pixels of a 2x2 patch
        "num_layers": blocks(tensors, "transformer_blocks"),
        "cross_attention_dim": size(tensors, "transformer_blocks.0.attn2.to_k.weight", 1),
        "caption_channels": size(tensors, "caption_projection.linear_1.weight", 1),
    }


def _pixart_rest(facts: Facts) -> Facts | None:
    """Width and head count are those of PixArt-Sigma XL. How large its images are (`interpolation_scale`), which the
    512 and 1024 models differ in, no tensor shows."""
    return None


QWEN_IMAGE = KnownClass(
    "QwenImageTransformer2DModel",
    "transformer",
    frozenset({"transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"}),
    _qwen_facts,
    _qwen_rest,
    frozenset({"num_layers"}),
)
SD3 = KnownClass(
    "SD3Transformer2DModel",
    "transformer",
    frozenset({"transformer_blocks.0.norm1_context.linear.weight", "pos_embed.pos_embed"}),
    _sd3_facts,
    _sd3_rest,
    frozenset({"num_layers"}),
)
SANA = KnownClass(
    "SanaTransformer2DModel",
    "transformer",
    frozenset({"transformer_blocks.0.ff.conv_inverted.weight", "caption_norm.weight"}),
    _sana_facts,
    _sana_rest,
    frozenset({"num_layers"}),
    beside=_sana_positions,
)
Z_IMAGE = KnownClass(
    "ZImageTransformer2DModel",
    "transformer",
    frozenset({"all_x_embedder.2-1.weight", "layers.0.adaLN_modulation.0.weight"}),
    _z_image_facts,
    _z_image_rest,
    frozenset({"n_layers"}),
    compared=frozenset(),  # in_channels times the patch's pixels is what a tensor shows
)
PIXART = KnownClass(
    "PixArtTransformer2DModel",
    "transformer",
    frozenset(
        {"adaln_single.linear.weight", "transformer_blocks.0.scale_shift_table", "pos_embed.proj.weight"}
    ),
    _pixart_facts,
    _pixart_rest,
    frozenset({"num_layers"}),
    legacy_name="Transformer2DModel",
)
