"""FLUX.2 (dev and klein): double and single blocks that share three modulation layers outside the stacks.

A single block has one projection for q, k, v and the gated MLP, and one for both results.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, together

FLUX2 = Family(
    name="flux2",
    models="FLUX.2 dev, klein",
    classes=("Flux2Transformer2DModel",),
    config_signature=frozenset({"num_single_layers", "timestep_guidance_channels", "mlp_ratio"}),
    component="transformer",
    blocks=(
        BlockRule(
            stack="transformer_blocks",
            w4a4=(
                together("attn.to_q", "attn.to_k", "attn.to_v"),
                together("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                alone("attn.to_out.0"),
                alone("attn.to_add_out"),
                alone("ff.linear_in"),
                alone("ff.linear_out"),
                alone("ff_context.linear_in"),
                alone("ff_context.linear_out"),
            ),
        ),
        BlockRule(
            stack="single_transformer_blocks",
            w4a4=(alone("attn.to_qkv_mlp_proj"), alone("attn.to_out")),
        ),
    ),
    keep=("x_embedder", "context_embedder", "time_guidance_embed.*", "norm_out.linear", "proj_out"),
    w4a16=(
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
    ),
)
