"""Lumina-Image 2.0's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, fused, renamed
from svdq_cli.source.original_names.table import in_stack, table

_BLOCK = (
    # three query heads for each head of keys and of values
    fused("attention.qkv", "attn.to_q", "attn.to_k", "attn.to_v", split=(3, 1, 1)),
    renamed("attention.out", "attn.to_out.0"),
    *(renamed(f"attention.{x}_norm", f"attn.norm_{x}") for x in "qk"),
    *(renamed(f"feed_forward.w{layer}", f"feed_forward.linear_{layer}") for layer in (1, 2, 3)),
    renamed("attention_norm2", "norm2"),
    *(renamed(f"ffn_norm{number}", f"ffn_norm{number}") for number in (1, 2)),
)

_MODULATED = (
    *_BLOCK,
    renamed("adaLN_modulation.1", "norm1.linear"),
    renamed("attention_norm1", "norm1.norm"),
)

LUMINA2 = Naming(
    name="original (Lumina 2) names",
    model_class="Lumina2Transformer2DModel",
    signature=frozenset({"layers.0.attention.qkv.weight", "noise_refiner.0.attention.qkv.weight"}),
    rules=table(
        *in_stack("layers", "layers", _MODULATED),
        *in_stack("noise_refiner", "noise_refiner", _MODULATED),
        *in_stack("context_refiner", "context_refiner", (*_BLOCK, renamed("attention_norm1", "norm1"))),
        renamed("x_embedder", "x_embedder"),
        renamed("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
        renamed("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
        renamed("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
        renamed("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
        renamed("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
        renamed("final_layer.linear", "norm_out.linear_2"),
    ),
    suffixes={},
    unused=frozenset({"norm_final.weight"}),
)
