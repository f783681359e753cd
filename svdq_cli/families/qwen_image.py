"""Qwen-Image and Qwen-Image-Edit: joint blocks with an image and a text stream, each with its own modulation."""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, attended, modulated, together

QWEN_IMAGE = Family(
    name="qwen-image",
    models="Qwen-Image, Qwen-Image-Edit",
    classes=("QwenImageTransformer2DModel",),
    config_signature=frozenset({"joint_attention_dim", "zero_cond_t", "use_layer3d_rope"}),
    component="transformer",
    blocks=(
        BlockRule(
            stack="transformer_blocks",
            w4a4=(
                together("attn.to_q", "attn.to_k", "attn.to_v"),
                together("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                alone("attn.to_out.0"),
                alone("attn.to_add_out"),
                alone("img_mlp.net.0.proj"),
                alone("img_mlp.net.2"),
                alone("txt_mlp.net.0.proj"),
                alone("txt_mlp.net.2"),
            ),
            w4a16=("img_mod.1", "txt_mod.1"),
            means=(
                modulated("attn.to_q", "attn.to_k", "attn.to_v", by="img_mod.1.bias", pieces={6: 0}),
                modulated(
                    "attn.add_q_proj",
                    "attn.add_k_proj",
                    "attn.add_v_proj",
                    by="txt_mod.1.bias",
                    pieces={6: 0},
                ),
                modulated("img_mlp.net.0.proj", by="img_mod.1.bias", pieces={6: 3}),
                modulated("txt_mlp.net.0.proj", by="txt_mod.1.bias", pieces={6: 3}),
                attended("attn.to_out.0", "attn.to_add_out", values=("attn.to_v", "attn.add_v_proj")),
            ),
        ),
    ),
    keep=("img_in", "txt_in", "time_text_embed.*", "norm_out.linear", "proj_out"),
)
