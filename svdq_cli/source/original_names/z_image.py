"""Z-Image's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, fused, renamed
from svdq_cli.source.original_names.table import in_stacks, table

_Z_IMAGE_STACKS = ("layers", "noise_refiner", "context_refiner")
Z_IMAGE = Naming(
    name="original (Z-Image) names",
    model_class="ZImageTransformer2DModel",
    signature=frozenset({"layers.0.attention.qkv.weight", "cap_embedder.1.weight", "x_pad_token"}),
    rules=table(
        *in_stacks(
            _Z_IMAGE_STACKS,
            (
                fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
                renamed("attention.out", "attention.to_out.0"),
                renamed("attention.q_norm", "attention.norm_q"),
                renamed("attention.k_norm", "attention.norm_k"),
                renamed("*", "*"),
            ),
        ),
        renamed("x_embedder", "all_x_embedder.2-1"),
        renamed("final_layer.*", "all_final_layer.2-1.*"),
        *(renamed(f"{name}.*", f"{name}.*") for name in ("t_embedder", "cap_embedder")),
        *(renamed(name, name) for name in ("x_pad_token", "cap_pad_token")),
    ),
    suffixes={},
    unused=frozenset({"norm_final.weight"}),
)
