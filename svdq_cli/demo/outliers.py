"""The stress variant: the same function with a few very large activation channels.

Trained at this size the demo model has few of the outlier channels that make large diffusion models hard to
quantize. A channel scaled up before a linear and down inside it leaves every image as it was and puts them there.
"""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from svdq_cli.errors import UsageError
from svdq_cli.storage.resources import demo_model_folder

MODEL = demo_model_folder()
FACTORS = (16.0, 32.0)  # powers of two, so that scaled bfloat16 weights stay exact
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# svdq demo model, stress variant

The images are those of the svdq demo model; the numbers inside are not. About 3 % of the input channels of
the linear layers in the transformer blocks were multiplied by 16 or 32, and the weights that read them were divided
by the same factor. In real numbers the function is unchanged. What changes is the range of the activations: they
have outlier channels like those of large diffusion models, so plain 4-bit rounding visibly fails here, and a
method that handles outliers has something to show.

This folder is a test object, made by `svdq_cli/demo/outliers.py` from the demo model. It was not trained this way.
"""


@torch.no_grad()
def add_outliers(transformer: FluxTransformer2DModel, *, fraction: float = 0.03, seed: int = 0) -> None:
    """Scale `fraction` of the channels of every block input and value projection by FACTORS, in place.

    Every input gets the same number of channels, its own choice of them, and no change of function.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    hidden = transformer.inner_dim
    count = max(1, round(fraction * hidden))
    for block in transformer.transformer_blocks:
        attention = block.attn
        streams = (
            (block.norm1.linear, (attention.to_q, attention.to_k, attention.to_v), block.ff),
            (
                block.norm1_context.linear,
                (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj),
                block.ff_context,
            ),
        )
        for modulation, projections, feed_forward in streams:
            # AdaLayerNormZero rows: shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp
            factors = _factors(hidden, count, generator)
            _scale_modulation(modulation, factors, shift=0, scale=1)
            _shrink_columns(projections, factors)
            factors = _factors(hidden, count, generator)
            _scale_modulation(modulation, factors, shift=3, scale=4)
            _shrink_columns([feed_forward.net[0].proj], factors)
        # attention mixes image and text values, so both streams share one choice
        factors = _factors(hidden, count, generator)
        _scale_rows([attention.to_v, attention.add_v_proj], factors)
        _shrink_columns([attention.to_out[0], attention.to_add_out], factors)
    for block in transformer.single_transformer_blocks:
        attention = block.attn
        # AdaLayerNormZeroSingle rows: shift, scale, gate
        factors = _factors(hidden, count, generator)
        _scale_modulation(block.norm.linear, factors, shift=0, scale=1)
        _shrink_columns([attention.to_q, attention.to_k, attention.to_v, block.proj_mlp], factors)
        factors = _factors(hidden, count, generator)
        _scale_rows([attention.to_v], factors)
        _shrink_columns([block.proj_out], factors)  # reads the attention's channels first, then the MLP's


def _factors(width: int, count: int, generator: torch.Generator) -> Tensor:
    """(width,) ones with `count` entries of FACTORS, in turn."""
    factors = torch.ones(width, dtype=torch.float32)
    for index, channel in enumerate(torch.randperm(width, generator=generator)[:count].tolist()):
        factors[channel] = FACTORS[index % len(FACTORS)]
    return factors


def _scale_modulation(modulation: nn.Linear, factors: Tensor, *, shift: int, scale: int) -> None:
    """Make LN(x) * (1 + scale) + shift larger by `factors`; `shift` and `scale` count chunks of its rows."""
    width = len(factors)
    factors = factors.to(modulation.weight)
    for chunk in (shift, scale):
        rows = slice(chunk * width, (chunk + 1) * width)
        modulation.weight[rows] *= factors[:, None]
        modulation.bias[rows] *= factors
    modulation.bias[scale * width : (scale + 1) * width] += factors - 1  # f (1 + s) = 1 + (f s + f - 1)


def _scale_rows(linears: Sequence[nn.Linear], factors: Tensor) -> None:
    for linear in linears:
        linear.weight *= factors.to(linear.weight)[:, None]
        if linear.bias is not None:
            linear.bias *= factors.to(linear.bias)


def _shrink_columns(linears: Sequence[nn.Linear], factors: Tensor) -> None:
    """Divide the first len(factors) input columns."""
    for linear in linears:
        linear.weight[:, : len(factors)] /= factors.to(linear.weight)


def export_demo(directory: Path, *, outliers: bool) -> Path:
    """Copy the embedded pipeline to `directory` (new or empty), with the stress variant's transformer if asked.

    The variant's transformer is written in float32: the shifted biases of its norms do not fit bfloat16.
    Raises UsageError where `directory` holds something.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty", hint="name a new folder for the demo model")
    shutil.copytree(MODEL, directory, dirs_exist_ok=True)
    if outliers:
        transformer = FluxTransformer2DModel.from_pretrained(
            directory / "transformer", torch_dtype=torch.float32
        )
        add_outliers(transformer)
        shutil.rmtree(directory / "transformer")
        transformer.save_pretrained(directory / "transformer")
        (directory / "README.md").write_text(CARD, encoding="utf-8")
    return directory
