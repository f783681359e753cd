"""FLUX.1, FLUX.2, and Chroma."""

from __future__ import annotations

from svdq_cli.source.configs.shapes import Facts, KnownClass, Shapes, blocks, heads, size


def _flux1_facts(tensors: Shapes) -> Facts:
    inputs, outputs = size(tensors, "x_embedder.weight", 1), size(tensors, "proj_out.weight", 0)
    return {
        "in_channels": inputs,
        "out_channels": None if outputs == inputs else outputs,
        "num_layers": blocks(tensors, "transformer_blocks"),
        "num_single_layers": blocks(tensors, "single_transformer_blocks"),
        **heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": size(tensors, "context_embedder.weight", 1),
        "pooled_projection_dim": size(tensors, "time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _flux1_rest(facts: Facts) -> Facts | None:
    published = facts["attention_head_dim"] == 128
    return {"patch_size": 1, "axes_dims_rope": [16, 56, 56]} if published else None


def _flux2_facts(tensors: Shapes) -> Facts:
    inputs, outputs = size(tensors, "x_embedder.weight", 1), size(tensors, "proj_out.weight", 0)
    hidden = size(tensors, "x_embedder.weight", 0)
    mlp = size(tensors, "transformer_blocks.0.ff.linear_out.weight", 1)
    return {
        "in_channels": inputs,
        "out_channels": None if outputs == inputs else outputs,
        "num_layers": blocks(tensors, "transformer_blocks"),
        "num_single_layers": blocks(tensors, "single_transformer_blocks"),
        **heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": size(tensors, "context_embedder.weight", 1),
        "timestep_guidance_channels": size(
            tensors, "time_guidance_embed.timestep_embedder.linear_1.weight", 1
        ),
        "mlp_ratio": mlp / hidden if hidden else 0.0,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in tensors,
    }


def _flux2_rest(facts: Facts) -> Facts | None:
    published = facts["attention_head_dim"] == 128
    rest: Facts = {"patch_size": 1, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6}
    return rest if published else None


FLUX1 = KnownClass(
    "FluxTransformer2DModel",
    "transformer",
    frozenset(
        {
            "transformer_blocks.0.norm1_context.linear.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
        }
    ),
    _flux1_facts,
    _flux1_rest,
    frozenset({"num_layers", "num_single_layers"}),
    frozenset({"in_channels", "guidance_embeds", "joint_attention_dim", "pooled_projection_dim"}),
)
FLUX2 = KnownClass(
    "Flux2Transformer2DModel",
    "transformer",
    frozenset(
        {"double_stream_modulation_img.linear.weight", "single_transformer_blocks.0.attn.to_out.weight"}
    ),
    _flux2_facts,
    _flux2_rest,
    frozenset({"num_layers", "num_single_layers"}),
)


def _chroma_facts(tensors: Shapes) -> Facts:
    inputs, outputs = size(tensors, "x_embedder.weight", 1), size(tensors, "proj_out.weight", 0)
    return {
        "in_channels": inputs,
        "out_channels": None if outputs == inputs else outputs,
        "num_layers": blocks(tensors, "transformer_blocks"),
        "num_single_layers": blocks(tensors, "single_transformer_blocks"),
        **heads(tensors, "transformer_blocks.0"),
        "joint_attention_dim": size(tensors, "context_embedder.weight", 1),
        "approximator_num_channels": size(tensors, "distilled_guidance_layer.in_proj.weight", 1),
        "approximator_hidden_dim": size(tensors, "distilled_guidance_layer.in_proj.weight", 0),
        "approximator_layers": blocks(tensors, "distilled_guidance_layer.layers"),
    }


CHROMA = KnownClass(
    "ChromaTransformer2DModel",
    "transformer",
    frozenset({"distilled_guidance_layer.in_proj.weight", "transformer_blocks.0.attn.to_q.weight"}),
    _chroma_facts,
    _flux1_rest,
    frozenset({"num_layers", "num_single_layers"}),
    frozenset({"in_channels", "joint_attention_dim"}),
)
