"""SANA in the files of Nunchaku's engine, which knows the true sizes and reads padded matrices.

Its kernels want keys and values interleaved by head of 32 channels, and hidden and gate rows of the feed-forward
network in pairs. From reading the engine's source; there was no published file to compare with.
"""

from __future__ import annotations

from svdq_cli.families.layouts.layout import (
    BlockLayout,
    Interleaved,
    KeptRule,
    KeysAndValuesByHead,
    ModelLayout,
    ModuleRule,
    kept,
    renamed,
)

_PAIRS = Interleaved(2)  # hidden 0, gate 0, hidden 1, gate 1, ...

NUNCHAKU = ModelLayout(
    family="sana",
    format="nunchaku",
    blocks=(
        BlockLayout(
            stack="transformer_blocks",
            stored="transformer_blocks",
            modules=(
                ModuleRule(
                    "attn.qkv_proj",
                    (("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
                    order=KeysAndValuesByHead(width=32),
                ),
                renamed("attn.out_proj", "attn1.to_out.0"),
                renamed("cross_attn.q_linear", "attn2.to_q"),
                renamed("cross_attn.out_proj", "attn2.to_out.0"),
                ModuleRule("ff.inverted_conv", (("ff.conv_inverted",),), order=_PAIRS),
                renamed("ff.point_conv", "ff.conv_point"),
            ),
            kept=(
                KeptRule("cross_attn.kv_linear.weight", ("attn2.to_k.weight", "attn2.to_v.weight")),
                KeptRule("cross_attn.kv_linear.bias", ("attn2.to_k.bias", "attn2.to_v.bias")),
                KeptRule("ff.depth_conv.weight", ("ff.conv_depth.weight",), order=_PAIRS, channels_last=True),
                kept("ff.depth_conv.bias", "ff.conv_depth.bias", order=_PAIRS),
            ),
        ),
    ),
    dialect="engine",
    pads=True,
    runtime_class="NunchakuSanaTransformer2DModel",
)
