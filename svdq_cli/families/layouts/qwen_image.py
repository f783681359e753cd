"""Qwen-Image and Qwen-Image-Edit: fused projections in Nunchaku's files, diffusers' own modules in ComfyUI's."""

from __future__ import annotations

from svdq_cli.families.layouts.layout import (
    BlockLayout,
    Marker,
    ModelLayout,
    modulation,
    renamed,
    same,
    stacked,
)

_MLPS = (
    same("img_mlp.net.0.proj"),
    renamed("img_mlp.net.2", "img_mlp.net.2", after_gelu=True),
    same("txt_mlp.net.0.proj"),
    renamed("txt_mlp.net.2", "txt_mlp.net.2", after_gelu=True),
)

NUNCHAKU = ModelLayout(
    family="qwen-image",
    format="nunchaku",
    blocks=(
        BlockLayout(
            stack="transformer_blocks",
            stored="transformer_blocks",
            modules=(
                stacked("attn.to_qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                stacked("attn.add_qkv_proj", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                same("attn.to_out.0"),
                same("attn.to_add_out"),
                *_MLPS,
                modulation("img_mod.1", parts=6),
                modulation("txt_mod.1", parts=6),
            ),
        ),
    ),
    runtime_class="NunchakuQwenImageTransformer2DModel",
)

COMFY = ModelLayout(
    family="qwen-image",
    format="comfy",
    markers=(Marker("__index_timestep_zero__", "zero_cond_t"),),  # Qwen-Image-Edit 2511
    blocks=(
        BlockLayout(
            stack="transformer_blocks",
            stored="transformer_blocks",
            modules=(
                same("attn.to_q"),
                same("attn.to_k"),
                same("attn.to_v"),
                same("attn.add_q_proj"),
                same("attn.add_k_proj"),
                same("attn.add_v_proj"),
                same("attn.to_out.0"),
                same("attn.to_add_out"),
                *_MLPS,
                same("img_mod.1"),
                same("txt_mod.1"),
            ),
        ),
    ),
)
