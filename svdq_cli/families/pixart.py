"""PixArt-Sigma (and PixArt-Alpha): one modulation for all blocks, self-attention, cross-attention to text, MLP.

SVDQuant's published PixArt-Sigma recipe keeps the cross-attention's keys and values and the modulation at 16 bits. The
official config calls the class Transformer2DModel, which diffusers turns into PixArtTransformer2DModel by `norm_type`.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, attended, modulated, together

PIXART = Family(
    name="pixart",
    models="PixArt-Sigma, PixArt-Alpha",
    classes=("PixArtTransformer2DModel", "Transformer2DModel"),
    config_signature=frozenset({"caption_channels", "num_embeds_ada_norm", "attention_type"}),
    component="transformer",
    blocks=(
        BlockRule(
            stack="transformer_blocks",
            w4a4=(
                together("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                alone("attn1.to_out.0"),
                alone("attn2.to_q"),
                alone("attn2.to_out.0"),
                alone("ff.net.0.proj"),
                alone("ff.net.2"),
            ),
            means=(
                modulated("attn1.to_q", "attn1.to_k", "attn1.to_v", by="scale_shift_table", pieces={6: 0}),
                modulated("ff.net.0.proj", by="scale_shift_table", pieces={6: 3}),
                attended("attn1.to_out.0", values=("attn1.to_v",)),
                attended("attn2.to_out.0", values=("attn2.to_v",)),
            ),
        ),
    ),
    keep=(
        "transformer_blocks.*.attn2.to_k",
        "transformer_blocks.*.attn2.to_v",
        "adaln_single.*",
        "caption_projection.*",
        "proj_out",
    ),
    config_values={"norm_type": "ada_norm_single"},
)
