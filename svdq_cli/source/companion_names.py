"""What the parts next to the diffusion model are called in whole checkpoints: text encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from svdq_cli.source.names import Naming, Rule, block_numbers, expanded, fused, numbered, renamed

_OPEN_CLIP = (
    renamed("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    renamed("token_embedding", "text_model.embeddings.token_embedding"),
    renamed("ln_final", "text_model.final_layer_norm"),
    # A bare matrix is kept transposed, `text_projection.weight` is not
    renamed("text_projection", "text_projection"),
    *(
        fused(
            f"transformer.resblocks.{{}}.attn.in_proj_{suffix}",
            *(f"text_model.encoder.layers.{{}}.self_attn.{x}_proj.{suffix}" for x in "qkv"),
        )
        for suffix in ("weight", "bias")
    ),
    *(
        renamed(f"transformer.resblocks.{{}}.{old}", f"text_model.encoder.layers.{{}}.{new}")
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        )
    ),
)
_VAE_RESNET = ("norm1", "conv1", "norm2", "conv2")
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


def _vae_resnet(original: str, target: str) -> tuple[Rule, ...]:
    same = tuple(renamed(f"{original}.{name}", f"{target}.{name}") for name in _VAE_RESNET)
    return (*same, renamed(f"{original}.nin_shortcut", f"{target}.conv_shortcut"))


def _vae_rules(keys: Sequence[str]) -> tuple[Rule, ...]:
    """LDM counts the decoder's stages from the image inwards, diffusers from the latents outwards."""
    rules = [renamed(name, name) for name in ("quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        rules += [renamed(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out")]
        rules.append(renamed(f"{half}.norm_out", f"{half}.conv_norm_out"))
        for number in (1, 2):
            rules += _vae_resnet(f"{half}.mid.block_{number}", f"{half}.mid_block.resnets.{number - 1}")
        attention = f"{half}.mid_block.attentions.0"
        rules += [renamed(f"{half}.mid.attn_1.{old}", f"{attention}.{new}") for old, new in _VAE_ATTENTION]
    for stage in block_numbers(keys, "encoder.down.{}", "encoder.down_blocks.{}"):
        rules += _vae_stage(keys, f"encoder.down.{stage}", f"encoder.down_blocks.{stage}", "downsample")
    stages = block_numbers(keys, "decoder.up.{}", "decoder.up_blocks.{}")
    for stage in stages:
        target = f"decoder.up_blocks.{stages[-1] - stage}"
        rules += _vae_stage(keys, f"decoder.up.{stage}", target, "upsample")
    return tuple(rules)


def _vae_stage(keys: Sequence[str], original: str, target: str, sampler: str) -> list[Rule]:
    rules = [renamed(f"{original}.{sampler}.conv", f"{target}.{sampler}rs.0.conv")]
    for number in block_numbers(keys, f"{original}.block.{{}}", f"{target}.resnets.{{}}"):
        for rule in _vae_resnet(f"{original}.block.{{}}", f"{target}.resnets.{{}}"):
            rules.append(numbered(rule, number))
    return rules


def _unchanged(*names: str) -> Callable[[Sequence[str]], tuple[Rule, ...]]:
    """Checkpoints hold these text encoders under their transformers names."""
    return lambda keys: tuple(renamed(name, name) for name in names)


OPEN_CLIP = Naming("OpenCLIP", "CLIPTextModelWithProjection", frozenset(), partial(expanded, _OPEN_CLIP), {})
LDM_VAE = Naming("LDM autoencoder", "AutoencoderKL", frozenset(), _vae_rules, {})
# transformers' names; older files, and 5.6 and later, have them without the wrapper's
_TRANSFORMERS_CLIP = (
    *(renamed(name, f"text_model.{name}") for name in ("embeddings.*", "encoder.*", "final_layer_norm")),
    *(renamed(name, name) for name in ("text_model.*", "text_projection")),
)
# Tools write either kind of names at either place
CLIP = Naming(
    "CLIP",
    "CLIPTextModelWithProjection",
    frozenset(),
    lambda keys: (*_TRANSFORMERS_CLIP, *expanded(_OPEN_CLIP, keys)),
    {},
)
CLIP_L = replace(CLIP, name="CLIP-L")  # may be stored without its projection, which is the identity then
T5 = Naming("T5", "T5EncoderModel", frozenset(), _unchanged("shared", "encoder.*"), {})

# Where whole checkpoints hold the parts of a pipeline: prefix in the file, component, names below the prefix
PLACES: tuple[tuple[str, str, Naming], ...] = (
    ("first_stage_model.", "vae", LDM_VAE),
    ("vae.", "vae", LDM_VAE),
    ("cond_stage_model.transformer.", "text_encoder", CLIP),
    ("cond_stage_model.model.", "text_encoder", CLIP),  # Stable Diffusion 2
    ("conditioner.embedders.0.transformer.", "text_encoder", CLIP),
    ("conditioner.embedders.0.model.", "text_encoder_2", CLIP),  # SDXL's refiner
    ("conditioner.embedders.1.model.", "text_encoder_2", CLIP),
    ("conditioner.embedders.1.transformer.", "text_encoder_2", CLIP),
    ("text_encoders.clip_l.transformer.", "text_encoder", CLIP_L),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", CLIP),  # SD3
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", T5),  # FLUX.1
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", T5),  # SD3
)
PREFIXES = tuple(dict.fromkeys(prefix for prefix, _, _ in PLACES))
