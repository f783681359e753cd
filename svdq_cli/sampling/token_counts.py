"""How many tokens each layer of a denoiser reads, and the memory one forward pass takes: from configs alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from svdq_cli.planning.blocks import places_of
from svdq_cli.records import Linear
from svdq_cli.sampling.compression import frames_a_latent, latent_scale, vae_config
from svdq_cli.sampling.passes import ONE_PASS, StepPasses
from svdq_cli.source import Source, is_expert

TEXT_TOKENS = 512  # T5's and Qwen's usual padding, where the recipe does not say
CLIP_TOKENS = 77
# diffusers' names of layers that read the text alone, in models with a stream for each
TEXT_LAYERS = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
# and of those that read it as keys and values, where the text is not a stream of its own
CROSS_ATTENTION = (".attn2.to_k", ".attn2.to_v", ".audio_attn2.to_k", ".audio_attn2.to_v")
# LTX-2: parts of a block that work on the sound, and of the attentions between sound and video the side that is each's
SOUND_LAYERS = ("audio_attn1", "audio_attn2", "audio_ff")
_CROSSED = {
    "audio_to_video_attn": ("to_k", "to_v"),
    "video_to_audio_attn": ("to_q", "to_out", "to_gate_logits"),
}
USUAL_FPS = 24.0  # of a video whose recipe names none
# Feature maps of a UNet's level that are alive at once: input, normalized input, output, and the skip connection
_MAPS = 4
_PACKED_CHANNELS = (64, 128)  # 16 and 32 channels of autoencoders, two by two
_VIDEO_SIDES = 3  # frames, height, width


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens that the layers of one denoiser read for one image or video in one pass."""

    by_layer: Mapping[str, int]  # linear layers; 1 for those that read one vector
    # layers of each block, by its path; a layer outside all by its name
    blocks: Mapping[str, tuple[Linear, ...]]
    maps: int  # numbers in a UNet's feature maps; 0 for a transformer
    passes: StepPasses = ONE_PASS  # of every image in a step

    def forward_bytes(self, *, batch: int, itemsize: int) -> int:
        """Activations that are alive at once while `batch` images are generated, guided in one call or in several.

        At most all inputs and outputs of the block that takes most, a float32 copy of its widest layer's input for
        statistics, and a UNet's feature maps.
        """
        block = max(map(self._block_numbers, self.blocks.values()), default=0)
        widest = max(map(self._widest_numbers, self.blocks.values()), default=0)
        return batch * self.passes.entries * ((block + self.maps) * itemsize + 4 * widest)

    def _block_numbers(self, linears: Sequence[Linear]) -> int:
        return sum(
            self.by_layer[linear.name] * (linear.in_features + linear.out_features) for linear in linears
        )

    def _widest_numbers(self, linears: Sequence[Linear]) -> int:
        return max(
            self.by_layer[linear.name] * max(linear.in_features, linear.out_features) for linear in linears
        )


def token_counts(
    source: Source,
    linears: Sequence[Linear],
    *,
    height: int,
    width: int,
    frames: int | None = None,
    fps: float | None = None,
    max_sequence_length: int | None = None,
    vectors: Collection[str] = (),
    passes: StepPasses = ONE_PASS,
) -> TokenCounts:
    """Tokens of every linear of the source's model at a size in pixels.

    `frames`, `fps`: of a video. `vectors`: layers that read one vector for an image, such as modulations.
    `passes`: how the model is guided.
    """
    text = text_tokens(source, max_sequence_length)
    image = image_tokens(source, height=height, width=width) * latent_frames(source, frames)
    sound = sound_tokens(source, frames, fps)
    names = [linear.name for linear in linears]
    places = places_of(names)
    blocks: dict[str, list[Linear]] = defaultdict(list)
    for linear in linears:
        blocks[places[linear.name].path or linear.name].append(linear)
    levels = _level_channels(source)
    counts: dict[str, int] = {}
    for members in blocks.values():
        own_stream = any(reads_text(linear.name) for linear in members)
        cross = not own_stream and any(linear.name.endswith(CROSS_ATTENTION) for linear in members)
        joint = not levels and not own_stream and not cross
        for linear in members:
            if linear.name in vectors or (levels and _reads_time(linear)):
                counts[linear.name] = 1
            elif reads_text(linear.name) or (cross and linear.name.endswith(CROSS_ATTENTION)):
                counts[linear.name] = text
            elif is_expert(linear.name):
                counts[linear.name] = max(1, math.ceil(image * expert_share(source)))
            elif sound and reads_sound(linear.name):
                counts[linear.name] = sound
            else:
                seen = max(1, image >> (2 * _level(linear.name, len(levels))))
                counts[linear.name] = seen + (text if joint else 0)
    maps = sum(_MAPS * channels * (image >> (2 * level)) for level, channels in enumerate(levels))
    return TokenCounts(counts, {path: tuple(members) for path, members in blocks.items()}, maps, passes)


def image_tokens(source: Source, *, height: int, width: int) -> int:
    """Tokens of an image of `height` x `width` pixels in the source's model; of a UNet, in its widest level."""
    side = pixels_per_token(source)
    return max(1, math.ceil(height / side) * math.ceil(width / side))


def text_tokens(source: Source, max_sequence_length: int | None) -> int:
    """Tokens of a prompt."""
    if max_sequence_length is not None:
        return max_sequence_length
    return CLIP_TOKENS if source.component == "unet" else TEXT_TOKENS


def reads_text(layer: str) -> bool:
    """Whether a layer reads the text's stream, in models that have one for it."""
    return any(part in TEXT_LAYERS for part in layer.split("."))


def reads_sound(layer: str) -> bool:
    """Whether a layer reads the sound's stream, in models that make it with the video."""
    parts = layer.split(".")
    return any(
        part in SOUND_LAYERS or (part in _CROSSED and parts[at + 1] in _CROSSED[part])
        for at, part in enumerate(parts[:-1])
    )


def expert_share(source: Source) -> float:
    """The part of an image's tokens that one expert of a mixture reads, where each expert chooses as many
    (NucleusMoE-Image: its capacity factor over the number of experts); all of them where the config does not say."""
    experts, factors = source.config.get("num_experts"), source.config.get("capacity_factors")
    most = max(factors, default=None) if isinstance(factors, (list, tuple)) else factors
    if not isinstance(experts, int) or experts < 1 or not isinstance(most, (int, float)):
        return 1.0
    return min(1.0, most / experts)


def sound_tokens(source: Source, frames: int | None, fps: float | None) -> int:
    """Tokens of the sound that a model makes with a video of `frames`; 0 where it makes none. The config of LTX-2 says
    how many latents a second of sound has."""
    rate, hop, scale = (
        source.config.get(key) for key in ("audio_sampling_rate", "audio_hop_length", "audio_scale_factor")
    )
    if frames is None or not (isinstance(rate, int) and isinstance(hop, int) and isinstance(scale, int)):
        return 0
    return max(1, round(frames / (fps or USUAL_FPS) * rate / (hop * scale)))


def pixels_per_token(source: Source) -> int:
    """A side in pixels: the autoencoder's downscaling times the model's own patches.

    A model with four times the autoencoder's channels reads latents that its pipeline has packed two by two. Where no
    autoencoder is at hand, that is a model without patches of its own and with more channels than any autoencoder of
    images has: FLUX.1 and Chroma (64), FLUX.2 (128).
    """
    vae = vae_config(source.pipeline)
    scale = latent_scale(vae)
    channels = vae.get("latent_channels") or vae.get("z_dim")
    patch, own = source.config.get("patch_size"), source.config.get("in_channels")
    packed = own == 4 * channels if isinstance(channels, int) else patch == 1 and own in _PACKED_CHANNELS
    if isinstance(patch, (list, tuple)) and patch:  # of a video: frames, height, width
        patch = patch[-1]
    return scale * (2 if packed else patch if isinstance(patch, int) else 1)


def latent_frames(source: Source, frames: int | None) -> int:
    """Frames that the denoiser sees of a video's `frames`: its autoencoder keeps the first and joins the others, and
    the model's own patches may join more."""
    if frames is None:
        return 1
    latents = 1 + (frames - 1) // frames_a_latent(vae_config(source.pipeline))
    patch = source.config.get("patch_size_t")
    whole = source.config.get("patch_size")
    if isinstance(whole, (list, tuple)) and len(whole) == _VIDEO_SIDES:
        patch = whole[0]
    return math.ceil(latents / patch) if isinstance(patch, int) and patch > 0 else latents


def _level_channels(source: Source) -> tuple[int, ...]:
    """Channels of a UNet's levels, the widest image first; none for a transformer."""
    channels = source.config.get("block_out_channels") if source.component == "unet" else None
    return tuple(channels) if isinstance(channels, (list, tuple)) else ()


def _level(layer: str, levels: int) -> int:
    """How often a UNet has halved the image where a layer reads it: `down_blocks.1` once, `mid_block` as often as it
    does."""
    part, _, rest = layer.partition(".")
    number = rest.partition(".")[0]
    if levels and part == "mid_block":
        return levels - 1
    if not levels or not number.isdecimal():
        return 0
    return {"down_blocks": int(number), "up_blocks": levels - 1 - int(number)}.get(part, 0)


def _reads_time(linear: Linear) -> bool:
    """Whether a linear of a UNet reads the time's (or the size's) embedding: all outside the attentions do."""
    return linear.kind == "linear" and ".attentions." not in linear.name
