"""PixArt's names, and those of SANA, which took over PixArt's blocks but for their MLP."""

from __future__ import annotations

from collections.abc import Sequence

from svdq_cli.source.names import Naming, Rule, expanded, fused, renamed
from svdq_cli.source.original_names.table import table

# PixArt's block, which SANA took over but for its MLP
_PIXART_BLOCK = (
    renamed("blocks.{}.scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
    fused("blocks.{}.attn.qkv", *(f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv")),
    renamed("blocks.{}.attn.proj", "transformer_blocks.{}.attn1.to_out.0"),
    renamed("blocks.{}.cross_attn.q_linear", "transformer_blocks.{}.attn2.to_q"),
    fused("blocks.{}.cross_attn.kv_linear", *(f"transformer_blocks.{{}}.attn2.to_{x}" for x in "kv")),
    renamed("blocks.{}.cross_attn.proj", "transformer_blocks.{}.attn2.to_out.0"),
    renamed("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    renamed("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    renamed("final_layer.linear", "proj_out"),
    renamed("final_layer.scale_shift_table", "scale_shift_table"),
)
# computed, and the empty prompt's embedding
_PIXART_UNUSED = frozenset({"pos_embed", "y_embedder.y_embedding"})


def _pixart_embedder(original: str, target: str) -> tuple[Rule, ...]:
    return (
        renamed(f"{original}.mlp.0", f"{target}.linear_1"),
        renamed(f"{original}.mlp.2", f"{target}.linear_2"),
    )


PIXART = Naming(
    name="original (PixArt) names",
    model_class="PixArtTransformer2DModel",
    signature=frozenset(
        {"blocks.0.cross_attn.kv_linear.weight", "blocks.0.mlp.fc1.weight", "t_block.1.weight"}
    ),
    rules=table(
        *_PIXART_BLOCK,
        renamed("x_embedder.proj", "pos_embed.proj"),
        *_pixart_embedder("t_embedder", "adaln_single.emb.timestep_embedder"),
        *_pixart_embedder("csize_embedder", "adaln_single.emb.resolution_embedder"),
        *_pixart_embedder("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
        renamed("t_block.1", "adaln_single.linear"),
        renamed("blocks.{}.mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
        renamed("blocks.{}.mlp.fc2", "transformer_blocks.{}.ff.net.2"),
    ),
    suffixes={},
    unused=_PIXART_UNUSED,
)

_SANA_BLOCK = (
    *_PIXART_BLOCK,
    renamed("blocks.{}.mlp.inverted_conv.conv", "transformer_blocks.{}.ff.conv_inverted"),
    renamed("blocks.{}.mlp.depth_conv.conv", "transformer_blocks.{}.ff.conv_depth"),
    renamed("blocks.{}.mlp.point_conv.conv", "transformer_blocks.{}.ff.conv_point"),
    # SANA 1.5 and SANA-Sprint only
    *(
        renamed(f"blocks.{{}}.{original}.{x}_norm", f"transformer_blocks.{{}}.{target}.norm_{x}")
        for original, target in (("attn", "attn1"), ("cross_attn", "attn2"))
        for x in "qk"
    ),
)


def _sana_rules(keys: Sequence[str]) -> tuple[Rule, ...]:
    """A model that is told its guidance (SANA-Sprint) holds the embedder of time one level higher in diffusers."""
    guided = any(key.startswith(("cfg_embedder.", "time_embed.guidance_embedder.")) for key in keys)
    rules = (
        *_SANA_BLOCK,
        renamed("x_embedder.proj", "patch_embed.proj"),
        *_pixart_embedder("t_embedder", f"time_embed{'' if guided else '.emb'}.timestep_embedder"),
        *_pixart_embedder("cfg_embedder", "time_embed.guidance_embedder"),
        renamed("t_block.1", "time_embed.linear"),
        renamed("attention_y_norm", "caption_norm"),
    )
    return expanded(rules, keys)


SANA = Naming(
    name="original (SANA) names",
    model_class="SanaTransformer2DModel",
    signature=frozenset({"blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.inverted_conv.conv.weight"}),
    rules=_sana_rules,
    suffixes={},
    # SANA-Sprint's estimate of its own loss serves its training
    unused=_PIXART_UNUSED | {"logvar_linear.weight", "logvar_linear.bias"},
)
