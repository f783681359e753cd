"""Small models that ComfyUI recognizes, and one call of each: the same numbers for ComfyUI's class and for diffusers'.

A model has one block of each kind, and the widths of the published one wherever ComfyUI takes them for granted. Calls
are of ComfyUI's `apply_model`: noisy latents and a sigma in, denoised ones out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 32  # of text; Z-Image pads to multiples of it
SIDE = 16  # of latents
SIGMA = 0.6


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of ComfyUI's `apply_model`: latents, context (1, TOKENS, width) and what else it is given."""

    x: Tensor
    context: Tensor
    sigma: float = SIGMA
    others: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    numbers: Mapping[str, int] = field(default_factory=dict[str, int])

    def tensors(self) -> dict[str, Tensor]:
        """As the loader script reads them."""
        return {"x": self.x, "context": self.context, "sigma": torch.tensor([self.sigma]), **self.others}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's config, its call, and the same call of diffusers' class, which returns the denoised latents."""

    config: Mapping[str, object]
    call: Callable[[], Call]
    denoised: Callable[[nn.Module, Call], Tensor]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- flow matching


def _packed(x: Tensor) -> Tensor:
    """(1, C, H, W) -> (1, H / 2 * W / 2, 4 C)."""
    parts = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpacked(tokens: Tensor, side: int) -> Tensor:
    """The inverse, of square latents."""
    parts = tokens.unflatten(1, (side // 2, side // 2)).unflatten(3, (-1, 2, 2))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)


def _grid(side: int, axes: int, rows: int, columns: int) -> Tensor:
    """The positions of side * side tokens, (side^2, axes), with the row and the column at those axes."""
    ids = torch.zeros(side, side, axes)
    ids[..., rows] += torch.arange(side)[:, None]
    ids[..., columns] += torch.arange(side)[None]
    return ids.flatten(0, 1)


def _flux_call() -> Call:
    others = {"y": _normal(1, 768, seed=2), "guidance": torch.tensor([3.5])}
    return Call(_normal(1, 16, SIDE, SIDE), _normal(1, TOKENS, 4096, seed=1), others=others)


def _flux(model: nn.Module, call: Call) -> Tensor:
    velocity = model(
        hidden_states=_packed(call.x),
        encoder_hidden_states=call.context,
        pooled_projections=call.others["y"],
        timestep=torch.tensor([call.sigma]),
        guidance=call.others["guidance"],
        img_ids=_grid(SIDE // 2, 3, 1, 2),
        txt_ids=torch.zeros(TOKENS, 3),
        return_dict=False,
    )[0]
    return call.x - call.sigma * _unpacked(velocity, SIDE)


def _flux2(model: nn.Module, call: Call) -> Tensor:
    text = torch.zeros(TOKENS, 4)
    text[:, 3] = torch.arange(TOKENS)
    velocity = model(
        hidden_states=call.x.flatten(2).transpose(1, 2),
        encoder_hidden_states=call.context,
        timestep=torch.tensor([call.sigma]),
        img_ids=_grid(SIDE, 4, 1, 2),
        txt_ids=text,
        return_dict=False,
    )[0]
    return call.x - call.sigma * velocity.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def _qwen_image(model: nn.Module, call: Call) -> Tensor:
    velocity = model(
        hidden_states=_packed(call.x[:, :, 0]),
        encoder_hidden_states=call.context,
        encoder_hidden_states_mask=torch.ones(1, TOKENS, dtype=torch.bool),
        timestep=torch.tensor([call.sigma]),
        img_shapes=[[(1, SIDE // 2, SIDE // 2)]],
        return_dict=False,
    )[0]
    return call.x - call.sigma * _unpacked(velocity, SIDE).unsqueeze(2)


def _z_image(model: nn.Module, call: Call) -> Tensor:
    """Its network counts time from noise to image, and its pipeline changes the sign."""
    found = model(
        [call.x[0].unsqueeze(1)], torch.tensor([1 - call.sigma]), [call.context[0]], return_dict=False
    )
    return call.x + call.sigma * found[0][0].squeeze(1)


def _wan(model: nn.Module, call: Call) -> Tensor:
    velocity = model(
        hidden_states=call.x,
        encoder_hidden_states=call.context,
        timestep=torch.tensor([1000 * call.sigma]),
        return_dict=False,
    )[0]
    return call.x - call.sigma * velocity


# ------------------------------------------------------------------------------------------------- SDXL

STEP = 500
SIZES = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)


def _sdxl_call() -> Call:
    """At the sigma of a step of the model's schedule. `y`: pooled text, then the sizes as sinusoids."""
    from diffusers.models.embeddings import get_timestep_embedding

    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)[STEP]
    sizes = get_timestep_embedding(torch.tensor(SIZES), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    others = {"y": torch.cat([_normal(1, 1280, seed=2), sizes.flatten()[None]], 1)}
    sigma = float(((1 - kept) / kept).sqrt())
    return Call(sigma * _normal(1, 4, SIDE, SIDE), _normal(1, TOKENS, 2048, seed=1), sigma, others)


def _sdxl(model: nn.Module, call: Call) -> Tensor:
    noise = model(
        call.x / (call.sigma**2 + 1) ** 0.5,
        torch.tensor([STEP]),
        encoder_hidden_states=call.context,
        added_cond_kwargs={
            "text_embeds": call.others["y"][:, :1280],
            "time_ids": torch.tensor([SIZES]),
        },
        return_dict=False,
    )[0]
    return call.x - call.sigma * noise


# ------------------------------------------------------------------------------------------------- the models

_FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
_FLUX2: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 128,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 2560,
    "guidance_embeds": False,
    "axes_dims_rope": [32, 32, 32, 32],
}
# of SDXL's relatives that ComfyUI knows, the one with the fewest blocks: Segmind Vega's
_SDXL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_QWEN: dict[str, Any] = {"_class_name": "QwenImageTransformer2DModel", "num_layers": 1}
_Z_IMAGE: dict[str, Any] = {"_class_name": "ZImageTransformer2DModel", "n_layers": 1}
_WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "ffn_dim": 8960,
    "num_layers": 1,
}

MODELS: Mapping[str, Model] = {
    "flux": Model(_FLUX, _flux_call, _flux),
    "flux2": Model(
        _FLUX2, lambda: Call(_normal(1, 128, SIDE, SIDE), _normal(1, TOKENS, 2560, seed=1)), _flux2
    ),
    "sdxl": Model(_SDXL, _sdxl_call, _sdxl),
    "qwen-image": Model(
        _QWEN, lambda: Call(_normal(1, 16, 1, SIDE, SIDE), _normal(1, TOKENS, 3584, seed=1)), _qwen_image
    ),
    "z-image": Model(
        _Z_IMAGE,
        lambda: Call(
            _normal(1, 16, SIDE, SIDE), _normal(1, TOKENS, 2560, seed=1), numbers={"num_tokens": TOKENS}
        ),
        _z_image,
    ),
    "wan": Model(_WAN, lambda: Call(_normal(1, 16, 3, SIDE, SIDE), _normal(1, TOKENS, 4096, seed=1)), _wan),
}
