"""Mochi's names."""

from __future__ import annotations

from collections.abc import Sequence

from svdq_cli.source.names import Naming, Rule, block_numbers, expanded, fused, numbered, renamed, swapped
from svdq_cli.source.original_names.table import in_stack


def _block() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for mark, projections, norm, out, mlp in (
        ("x", ("to_q", "to_k", "to_v"), "norm_", "to_out.0", "ff"),
        ("y", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out", "ff_context"),
    ):
        rules += [
            fused(f"attn.qkv_{mark}", *(f"attn1.{name}" for name in projections)),
            *(renamed(f"attn.{x}_norm_{mark}", f"attn1.{norm}{x}") for x in "qk"),
            renamed(f"attn.proj_{mark}", f"attn1.{out}"),
            # the original has the gate above the values, diffusers' SwiGLU the values above the gate
            swapped(f"mlp_{mark}.w1", f"{mlp}.net.0.proj"),
            renamed(f"mlp_{mark}.w2", f"{mlp}.net.2"),
        ]
    return (
        *rules,
        renamed("mod_x", "norm1.linear"),
        renamed("mod_y", "norm1_context.linear"),
    )


_RULES = (
    *in_stack("blocks", "transformer_blocks", _block()),
    renamed("x_embedder.proj", "patch_embed.proj"),
    renamed("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    renamed("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    *(renamed(f"t5_y_embedder.{x}", f"time_embed.pooler.{x}") for x in ("to_kv", "to_q", "to_out")),
    renamed("t5_yproj", "time_embed.caption_proj"),
    swapped("final_layer.mod", "norm_out.linear"),
    renamed("final_layer.linear", "proj_out"),
    renamed("pos_frequencies", "pos_frequencies"),
)


def _mochi_rules(keys: Sequence[str]) -> tuple[Rule, ...]:
    """The text stream of the last block goes nowhere, and its modulation has a name of its own in diffusers."""
    rules = {rule.original: rule for rule in expanded(_RULES, keys)}
    if blocks := block_numbers(keys, "blocks.{}", "transformer_blocks.{}"):
        last = numbered(
            renamed("blocks.{}.mod_y", "transformer_blocks.{}.norm1_context.linear_1"), blocks[-1]
        )
        rules[last.original] = last
    return tuple(rules.values())


MOCHI = Naming(
    name="original (Mochi) names",
    model_class="MochiTransformer3DModel",
    signature=frozenset({"blocks.0.attn.qkv_x.weight", "t5_y_embedder.to_kv.weight"}),
    rules=_mochi_rules,
    suffixes={},
)
