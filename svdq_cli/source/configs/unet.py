"""The UNets of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from svdq_cli.source.configs.shapes import Facts, KnownClass, Shapes, blocks, size


def _unet_facts(tensors: Shapes) -> Facts:
    widths: list[int] = []
    while width := size(tensors, f"down_blocks.{len(widths)}.resnets.0.conv1.weight", 0):
        widths.append(width)
    context = next(
        (entry.shape[1] for name, entry in tensors.items() if name.endswith("attn2.to_k.weight")), 0
    )
    return {
        "in_channels": size(tensors, "conv_in.weight", 1),
        "out_channels": size(tensors, "conv_out.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": blocks(tensors, "down_blocks.0.resnets"),
        "cross_attention_dim": context,
    }


def _unet_depths(tensors: Shapes) -> Facts:
    """Transformer blocks of each stage on the way down; 0 where a stage has no attention."""
    depths: list[int] = []
    while f"down_blocks.{len(depths)}.resnets.0.conv1.weight" in tensors:
        depths.append(blocks(tensors, f"down_blocks.{len(depths)}.attentions.0.transformer_blocks"))
    return {"transformer_layers_per_block": depths}


_ATTENTION_DOWN, _PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_ATTENTION_UP, _PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
_SD1: Facts = {
    "sample_size": 64,
    "down_block_types": [*[_ATTENTION_DOWN] * 3, _PLAIN_DOWN],
    "up_block_types": [_PLAIN_UP, *[_ATTENTION_UP] * 3],
    "attention_head_dim": 8,
}
_SD2: Facts = {**_SD1, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_SDXL: Facts = {
    "sample_size": 128,
    "down_block_types": [_PLAIN_DOWN, *[_ATTENTION_DOWN] * 2],
    "up_block_types": [*[_ATTENTION_UP] * 2, _PLAIN_UP],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Widths of the stages and of the text: Stable Diffusion 1.x, 2.x and XL
_UNETS: tuple[tuple[list[int], int, Facts], ...] = (
    ([320, 640, 1280, 1280], 768, _SD1),
    ([320, 640, 1280, 1280], 1024, _SD2),
    ([320, 640, 1280], 2048, _SDXL),
)


def _unet_rest(facts: Facts) -> Facts | None:
    for widths, text, rest in _UNETS:
        if (facts["block_out_channels"], facts["cross_attention_dim"]) == (widths, text):
            return rest
    return None


UNET = KnownClass(
    "UNet2DConditionModel",
    "unet",
    frozenset({"conv_out.weight", "down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"}),
    _unet_facts,
    _unet_rest,
    compared=frozenset({"in_channels", "cross_attention_dim"}),
    shown=_unet_depths,
)
