"""FLUX.1 in the files of Nunchaku's engine and of ComfyUI."""

from __future__ import annotations

from svdq_cli.families.layouts.layout import (
    BlockLayout,
    ColumnPart,
    ComfyArgument,
    HalvesSwapped,
    ModelLayout,
    ModuleRule,
    kept,
    kept_linear,
    modulation,
    renamed,
    stacked,
)

# A single block's proj_out reads the attention's output and the MLP's, side by side.
_PROJ_OUT_INPUTS = ("attn.to_v", "proj_mlp")

NUNCHAKU = ModelLayout(
    family="flux",
    format="nunchaku",
    blocks=(
        BlockLayout(
            stack="transformer_blocks",
            stored="transformer_blocks",
            modules=(
                stacked("qkv_proj", "attn.to_q", "attn.to_k", "attn.to_v"),
                stacked("qkv_proj_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                renamed("out_proj", "attn.to_out.0"),
                renamed("out_proj_context", "attn.to_add_out"),
                renamed("mlp_fc1", "ff.net.0.proj"),
                renamed("mlp_fc2", "ff.net.2", after_gelu=True),
                renamed("mlp_context_fc1", "ff_context.net.0.proj"),
                renamed("mlp_context_fc2", "ff_context.net.2", after_gelu=True),
                modulation("norm1.linear", parts=6),
                modulation("norm1_context.linear", parts=6),
            ),
            kept=(
                kept("norm_q.weight", "attn.norm_q.weight"),
                kept("norm_k.weight", "attn.norm_k.weight"),
                kept("norm_added_q.weight", "attn.norm_added_q.weight"),
                kept("norm_added_k.weight", "attn.norm_added_k.weight"),
            ),
        ),
        BlockLayout(
            stack="single_transformer_blocks",
            stored="single_transformer_blocks",
            modules=(
                stacked("qkv_proj", "attn.to_q", "attn.to_k", "attn.to_v"),
                renamed("mlp_fc1", "proj_mlp"),
                ModuleRule("out_proj", (("proj_out",),), columns=ColumnPart(_PROJ_OUT_INPUTS, 0)),
                ModuleRule(
                    "mlp_fc2", (("proj_out",),), columns=ColumnPart(_PROJ_OUT_INPUTS, 1), after_gelu=True
                ),
                modulation("norm.linear", parts=3),
            ),
            kept=(
                kept("norm_q.weight", "attn.norm_q.weight"),
                kept("norm_k.weight", "attn.norm_k.weight"),
            ),
        ),
    ),
    dialect="engine",
    always_bias=True,
    runtime_class="NunchakuFluxTransformer2dModel",
    comfy_class="Flux",
    comfy_constants=(
        ("disable_unet_model_creation", True),
        ("image_model", "flux"),
        ("mlp_ratio", 4.0),
        ("out_channels", 16),
        ("patch_size", 2),
        ("qkv_bias", True),
        ("theta", 10000),
    ),
    comfy_arguments=(
        ComfyArgument("axes_dim", ("axes_dims_rope",)),
        ComfyArgument("context_in_dim", ("joint_attention_dim",)),
        ComfyArgument("depth", ("num_layers",)),
        ComfyArgument("depth_single_blocks", ("num_single_layers",)),
        ComfyArgument("guidance_embed", ("guidance_embeds",)),
        ComfyArgument("hidden_size", ("num_attention_heads", "attention_head_dim")),
        ComfyArgument("in_channels", ("in_channels",), divisor=4),  # a token is 2 by 2 latent pixels
        ComfyArgument("num_heads", ("num_attention_heads",)),
        ComfyArgument("vec_in_dim", ("pooled_projection_dim",)),
    ),
)

COMFY = ModelLayout(
    family="flux",
    format="comfy",
    blocks=(
        BlockLayout(
            stack="transformer_blocks",
            stored="double_blocks",
            modules=(
                stacked("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                stacked("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                renamed("img_attn.proj", "attn.to_out.0"),
                renamed("txt_attn.proj", "attn.to_add_out"),
                renamed("img_mlp.0", "ff.net.0.proj"),
                renamed("img_mlp.2", "ff.net.2", after_gelu=True),
                renamed("txt_mlp.0", "ff_context.net.0.proj"),
                renamed("txt_mlp.2", "ff_context.net.2", after_gelu=True),
                renamed("img_mod.lin", "norm1.linear"),
                renamed("txt_mod.lin", "norm1_context.linear"),
            ),
            kept=(
                kept("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
                kept("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
                kept("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
                kept("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
            ),
        ),
        BlockLayout(
            stack="single_transformer_blocks",
            stored="single_blocks",
            modules=(
                ModuleRule("linear1", (("attn.to_q", "attn.to_k", "attn.to_v"), ("proj_mlp",))),
                renamed("linear2", "proj_out"),
                renamed("modulation.lin", "norm.linear"),
            ),
            kept=(
                kept("norm.query_norm.scale", "attn.norm_q.weight"),
                kept("norm.key_norm.scale", "attn.norm_k.weight"),
            ),
        ),
    ),
    kept=(
        *kept_linear("img_in", "x_embedder"),
        *kept_linear("txt_in", "context_embedder"),
        *kept_linear("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        *kept_linear("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        *kept_linear("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        *kept_linear("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        *kept_linear("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        *kept_linear("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        # diffusers' final norm has (scale, shift), ComfyUI's (shift, scale)
        *kept_linear("final_layer.adaLN_modulation.1", "norm_out.linear", order=HalvesSwapped()),
        *kept_linear("final_layer.linear", "proj_out"),
    ),
    names_all=True,
)
