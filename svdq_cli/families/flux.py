"""FLUX.1 (dev, schnell, Fill, Kontext): double blocks with an image and a text stream, then single blocks.

Which layers share an input follows SVDQuant's published FLUX.1 recipe: q, k, v of one stream share the smoothing factor
and the down projection; a single block's MLP reads the same input as its q, k, v but has its own branch.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, InputRule, alone, attended, modulated, together

FLUX = Family(
    name="flux",
    models="FLUX.1 dev, schnell, Fill, Kontext",
    classes=("FluxTransformer2DModel",),
    config_signature=frozenset(
        {"num_single_layers", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope"}
    ),
    component="transformer",
    blocks=(
        BlockRule(
            stack="transformer_blocks",
            w4a4=(
                together("attn.to_q", "attn.to_k", "attn.to_v"),
                together("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                alone("attn.to_out.0"),
                alone("attn.to_add_out"),
                alone("ff.net.0.proj"),
                alone("ff.net.2"),
                alone("ff_context.net.0.proj"),
                alone("ff_context.net.2"),
            ),
            w4a16=("norm1.linear", "norm1_context.linear"),
            means=(
                modulated("attn.to_q", "attn.to_k", "attn.to_v", by="norm1.linear.bias", pieces={6: 0}),
                modulated(
                    "attn.add_q_proj",
                    "attn.add_k_proj",
                    "attn.add_v_proj",
                    by="norm1_context.linear.bias",
                    pieces={6: 0},
                ),
                modulated("ff.net.0.proj", by="norm1.linear.bias", pieces={6: 3}),
                modulated("ff_context.net.0.proj", by="norm1_context.linear.bias", pieces={6: 3}),
                attended("attn.to_out.0", "attn.to_add_out", values=("attn.to_v", "attn.add_v_proj")),
            ),
        ),
        BlockRule(
            stack="single_transformer_blocks",
            w4a4=(
                InputRule(
                    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                    (("attn.to_q", "attn.to_k", "attn.to_v"), ("proj_mlp",)),
                ),
                alone("proj_out"),
            ),
            w4a16=("norm.linear",),
            means=(
                modulated(
                    "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", by="norm.linear.bias", pieces={3: 0}
                ),
                attended("proj_out", values=("attn.to_v",), first=True),
            ),
        ),
    ),
    keep=("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.linear", "proj_out"),
)
