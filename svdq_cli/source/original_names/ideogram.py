"""Ideogram 4's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, fused, renamed
from svdq_cli.source.original_names.table import in_stack, table

IDEOGRAM4 = Naming(
    name="original (Ideogram 4) names",
    model_class="Ideogram4Transformer2DModel",
    signature=frozenset({"layers.0.attention.qkv.weight", "layers.0.attention.o.weight"}),
    rules=table(
        *in_stack(
            "layers",
            "layers",
            (
                fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
                renamed("attention.o", "attention.to_out.0"),
                renamed("*", "*"),
            ),
        ),
    ),
    suffixes={},
)
