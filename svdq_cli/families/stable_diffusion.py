"""The UNets of Stable Diffusion XL (and Turbo) and of Stable Diffusion 1.x and 2.x, which follow the same rules.

Only transformer blocks are quantized. The keys and values of the cross-attention read the few text tokens, cost little
and stay at 16 bits, as do convolutions and embeddings: the layers that Nunchaku's SDXL engine runs in 4 bits. The feed-
forward network is a GEGLU, whose two halves come from one projection.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, modulated, together

_STACKS = (
    "down_blocks.*.attentions.*.transformer_blocks",
    "mid_block.attentions.*.transformer_blocks",
    "up_blocks.*.attentions.*.transformer_blocks",
)
_BLOCKS = tuple(
    BlockRule(
        stack=stack,
        w4a4=(
            together("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            alone("attn1.to_out.0"),
            alone("attn2.to_q"),
            alone("attn2.to_out.0"),
            alone("ff.net.0.proj"),
            alone("ff.net.2"),
        ),
        means=(modulated("ff.net.0.proj", by="norm3.bias", pieces={1: 0}),),
        optional=stack.startswith("mid_block"),  # SSD-1B has no attention there, KOALA 700M no middle block
    )
    for stack in _STACKS
)
_KEEP = (
    "*.attn2.to_k",
    "*.attn2.to_v",
    "*.attentions.*.proj_in",  # linear in SDXL, a 1x1 convolution in SD 1.x
    "*.attentions.*.proj_out",
    "*.resnets.*.time_emb_proj",
    "*.resnets.*.conv_shortcut",
    "time_embedding.*",
    "add_embedding.*",
    "class_embedding*",
    "encoder_hid_proj*",
)

SDXL = Family(
    name="sdxl",
    models="Stable Diffusion XL, SDXL-Turbo",
    classes=("UNet2DConditionModel",),
    config_signature=frozenset(
        {"transformer_layers_per_block", "addition_time_embed_dim", "up_block_types", "cross_attention_dim"}
    ),
    component="unet",
    blocks=_BLOCKS,
    keep=_KEEP,
    config_values={"addition_embed_type": "text_time"},
)

SD15 = Family(
    name="sd15",
    models="Stable Diffusion 1.x and 2.x",
    classes=("UNet2DConditionModel",),
    config_signature=frozenset({"down_block_types", "up_block_types", "cross_attention_dim"}),
    component="unet",
    blocks=_BLOCKS,
    keep=_KEEP,
    config_values={"addition_embed_type": None},
)
