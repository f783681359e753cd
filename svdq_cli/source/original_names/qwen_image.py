"""Qwen-Image 2.1's names: diffusers' own but for a matrix that ComfyUI joins."""

from __future__ import annotations

from svdq_cli.source.names import Naming, fused, renamed
from svdq_cli.source.original_names.table import in_stack, table

QWEN_IMAGE_21 = Naming(
    name="ComfyUI's (Qwen-Image 2.1) names",
    model_class="QwenImage21Transformer2DModel",
    signature=frozenset({"transformer_blocks.0.img_mlp.gate_up.weight", "modulation.1.weight"}),
    rules=table(
        *in_stack(
            "transformer_blocks",
            "transformer_blocks",
            (fused("img_mlp.gate_up", "img_mlp.gate_layer", "img_mlp.proj"), renamed("*", "*")),
        ),
        *(renamed(f"{name}.*", f"{name}.*") for name in ("time_text_embed", "txt_in", "modulation")),
        *(renamed(name, name) for name in ("img_in", "norm_out.linear", "proj_out")),
    ),
    suffixes={},
)
