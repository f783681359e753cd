"""Stable Diffusion 3 and 3.5: joint blocks with an image and a text stream.

The last block ends the text stream: it has neither its output projection nor its feed-forward network. SD3.5-medium has
a second self-attention of the image stream in its first blocks.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, attended, modulated, together

SD3 = Family(
    name="sd3",
    models="Stable Diffusion 3, 3.5 medium and large",
    classes=("SD3Transformer2DModel",),
    config_signature=frozenset({"pos_embed_max_size", "caption_projection_dim", "pooled_projection_dim"}),
    component="transformer",
    blocks=(
        BlockRule(
            stack="transformer_blocks",
            w4a4=(
                together("attn.to_q", "attn.to_k", "attn.to_v"),
                together("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                alone("attn.to_out.0"),
                alone("attn.to_add_out", optional=True),
                together("attn2.to_q", "attn2.to_k", "attn2.to_v", optional=True),
                alone("attn2.to_out.0", optional=True),
                alone("ff.net.0.proj"),
                alone("ff.net.2"),
                alone("ff_context.net.0.proj", optional=True),
                alone("ff_context.net.2", optional=True),
            ),
            w4a16=("norm1.linear", "norm1_context.linear"),
            means=(
                modulated("attn.to_q", "attn.to_k", "attn.to_v", by="norm1.linear.bias", pieces={6: 0, 9: 0}),
                # of the last block, which ends the stream, a scale and then the shift
                modulated(
                    "attn.add_q_proj",
                    "attn.add_k_proj",
                    "attn.add_v_proj",
                    by="norm1_context.linear.bias",
                    pieces={6: 0, 2: 1},
                ),
                modulated("attn2.to_q", "attn2.to_k", "attn2.to_v", by="norm1.linear.bias", pieces={9: 6}),
                modulated("ff.net.0.proj", by="norm1.linear.bias", pieces={6: 3, 9: 3}),
                modulated("ff_context.net.0.proj", by="norm1_context.linear.bias", pieces={6: 3}),
                attended("attn.to_out.0", "attn.to_add_out", values=("attn.to_v", "attn.add_v_proj")),
                attended("attn2.to_out.0", values=("attn2.to_v",)),
            ),
        ),
    ),
    keep=("pos_embed.*", "context_embedder", "time_text_embed.*", "norm_out.linear", "proj_out"),
)
