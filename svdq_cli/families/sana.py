"""SANA: linear self-attention, cross-attention to text, and a gated feed-forward network made of convolutions.

Its two 1x1 convolutions, half of the model, are linear layers over channels and are quantized as such by formats that
can hold them; the 3x3 depthwise convolution between them stays at 16 bits.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, attended, modulated, together

SANA = Family(
    name="sana",
    models="SANA",
    classes=("SanaTransformer2DModel",),
    config_signature=frozenset({"num_cross_attention_heads", "cross_attention_head_dim", "mlp_ratio"}),
    component="transformer",
    blocks=(
        BlockRule(
            stack="transformer_blocks",
            w4a4=(
                together("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                alone("attn1.to_out.0"),
                alone("attn2.to_q"),
                alone("attn2.to_out.0"),
                alone("ff.conv_inverted"),
                alone("ff.conv_point"),
            ),
            means=(
                modulated("ff.conv_inverted", by="scale_shift_table", pieces={6: 3}),
                attended("attn2.to_out.0", values=("attn2.to_v",)),
            ),
        ),
    ),
    keep=(
        "transformer_blocks.*.attn2.to_k",
        "transformer_blocks.*.attn2.to_v",
        "patch_embed.*",  # a 1x1 convolution where the patch size is 1
        "time_embed.*",
        "caption_projection.*",
        "proj_out",
    ),
)
