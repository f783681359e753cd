"""How many tokens a denoiser sees, and the memory one forward pass takes: from configs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from svdq_cli.records import Linear
from svdq_cli.source import Source, read_json

TEXT_TOKENS = 512  # T5's and Qwen's usual padding, where the recipe does not say
CLIP_TOKENS = 77
# diffusers' names of layers that read the text alone, in models with a stream for each
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")


def image_tokens(source: Source, *, height: int, width: int) -> int:
    """Tokens of a picture of `height` x `width` pixels in the widest blocks of the source's model."""
    side = pixels_per_token(source)
    return max(1, -(-height // side) * -(-width // side))


def text_tokens(source: Source, max_sequence_length: int | None) -> int:
    if max_sequence_length is not None:
        return max_sequence_length
    return CLIP_TOKENS if source.component == "unet" else TEXT_TOKENS


def reads_text(layer: str) -> bool:
    """Whether a layer reads the text's stream, in models that have one for it."""
    return any(part in TEXT_LAYERS for part in layer.split("."))


def pixels_per_token(source: Source) -> int:
    """A side in pixels: the autoencoder's downscaling times the model's own patches.

    A model with four times the autoencoder's channels reads latents that its pipeline has packed two by two.
    """
    vae = _vae_config(source.pipeline)
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or vae.get("dim_mult")
    scale = 2 ** (len(cast("Sequence[object]", levels)) - 1) if isinstance(levels, (list, tuple)) else 8
    channels = vae.get("latent_channels") or vae.get("z_dim")
    packed = isinstance(channels, int) and source.config.get("in_channels") == 4 * channels
    patch = source.config.get("patch_size")
    return scale * (2 if packed else patch if isinstance(patch, int) else 1)


def forward_bytes(linears: Sequence[Linear], *, tokens: int, itemsize: int) -> int:
    """Activations that are alive at once: at most all inputs and outputs of the block with the widest layers, and a
    float32 copy of the widest one for its statistics."""
    blocks: dict[str, int] = {}
    for linear in linears:
        block = _block(linear.name)
        blocks[block] = blocks.get(block, 0) + linear.in_features + linear.out_features
    widest = max((max(linear.in_features, linear.out_features) for linear in linears), default=0)
    return tokens * (max(blocks.values(), default=0) * itemsize + 4 * widest)


def _block(name: str) -> str:
    """The path up to the first number: the block that a layer is in, or the layer itself."""
    parts = name.split(".")
    end = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: end + 1])


def _vae_config(pipeline: Path | None) -> Mapping[str, object]:
    config = pipeline / "vae" / "config.json" if pipeline else None
    return read_json(config) if config and config.is_file() else {}
