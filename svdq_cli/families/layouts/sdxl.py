"""Stable Diffusion XL's UNet in Nunchaku's files. Its loader takes outer scales by row only, and tensors under the
engine's names only: it renames them itself, `smooth` to `smooth_factor` even where it is that already."""

from __future__ import annotations

from svdq_cli.families.layouts.layout import BlockLayout, ModelLayout, same, stacked

_MODULES = (
    stacked("attn1.to_qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    same("attn1.to_out.0"),
    same("attn2.to_q"),
    same("attn2.to_out.0"),
    same("ff.net.0.proj"),
    same("ff.net.2"),
)
_STACKS = (
    "down_blocks.*.attentions.*.transformer_blocks",
    "mid_block.attentions.*.transformer_blocks",
    "up_blocks.*.attentions.*.transformer_blocks",
)

NUNCHAKU = ModelLayout(
    family="sdxl",
    format="nunchaku",
    blocks=tuple(BlockLayout(stack, stack, _MODULES) for stack in _STACKS),
    dialect="engine",
    row_scales=True,
    runtime_class="NunchakuSDXLUNet2DConditionModel",
)
