"""Krea 2's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, renamed
from svdq_cli.source.original_names.table import in_stack, table

_BLOCK = (
    *(renamed(f"attn.w{x}", f"attn.to_{x}") for x in "qkv"),
    renamed("attn.wo", "attn.to_out.0"),
    renamed("attn.gate", "attn.to_gate"),
    *(renamed(f"attn.qknorm.{x}norm", f"attn.norm_{x}") for x in "qk"),
    *(renamed(f"mlp.{name}", f"ff.{name}") for name in ("gate", "up", "down")),
    renamed("prenorm", "norm1"),
    renamed("postnorm", "norm2"),
    # (6 * width,) in the original, (6, width) in diffusers: no adapter changes it
    renamed("mod.lin", "scale_shift_table"),
)

KREA2 = Naming(
    name="original (Krea 2) names",
    model_class="Krea2Transformer2DModel",
    signature=frozenset({"blocks.0.attn.wq.weight", "txtfusion.projector.weight"}),
    rules=table(
        *in_stack("blocks", "transformer_blocks", _BLOCK),
        *in_stack("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", _BLOCK),
        *in_stack("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", _BLOCK),
        renamed("txtfusion.projector", "text_fusion.projector"),
        renamed("first", "img_in"),
        renamed("tmlp.0", "time_embed.linear_1"),
        renamed("tmlp.2", "time_embed.linear_2"),
        renamed("tproj.1", "time_mod_proj"),
        renamed("txtmlp.0", "txt_in.norm"),
        renamed("txtmlp.1", "txt_in.linear_1"),
        renamed("txtmlp.3", "txt_in.linear_2"),
        renamed("last.linear", "final_layer.linear"),
        renamed("last.norm", "final_layer.norm"),
        renamed("last.modulation.lin", "final_layer.scale_shift_table"),
    ),
    suffixes={"scale": "weight"},
)
