"""One forward pass of a model without memory, to see which linear layers read the same tensor.

The model and its arguments live on torch's meta device: shapes flow, numbers do not, so that a model of any size takes
a second. The arguments of an unknown `forward` are put together from its parameters' names, which diffusers keeps
uniform, and from the config's widths; the first combination that runs through is taken.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.planning.pointwise import channels_last, is_pointwise
from svdq_cli.planning.structure import Reading

_SIDE = 32  # latent pixels: a multiple of every usual patch size
_IMAGE_TOKENS = 64
_TEXT_TOKENS = 16
_MAX_TRIES = 200

_LATENTS = re.compile(r"^(hidden_states|sample|x|latents|latent_model_input)$")
_TEXT = re.compile(r"^(encoder_hidden_states|context|cap_feats|text_embeds?|prompt_embeds)$")
_TIME = re.compile(r"^(t|timesteps?|time_step|sigma)$")
_CHANNEL_KEYS = ("in_channels", "in_dim", "input_dim", "num_channels", "in_channel")
_TEXT_KEY = re.compile(
    r"joint_attention_dim|cross_attention_dim|caption|text|cap_feat|encoder|context|condition"
)


def watch(model: nn.Module) -> dict[str, Reading] | None:
    """What every linear of a meta-device model reads; None where no forward pass could be put together."""
    config = dict(getattr(model, "config", {}))
    model.eval()
    for arguments in itertools.islice(_candidates(model, config), _MAX_TRIES):
        try:
            return watch_call(model, arguments)
        except Exception:  # any model's own way to refuse wrong shapes; the next combination is tried
            continue
    return None


def watch_call(
    model: nn.Module, arguments: Mapping[str, Any], positional: tuple[Any, ...] = ()
) -> dict[str, Reading]:
    """The readings of one call. Raises whatever the model raises."""
    seen: list[Tensor] = []  # kept alive, so that an identity is never given twice
    readings: dict[str, Reading] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_pointwise(module):

            def before(layer: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                if not args or name in readings:
                    return
                seen.append(args[0])
                x = channels_last(args[0]) if isinstance(layer, nn.Conv2d) else args[0]
                rows = x.numel() // x.shape[-1]
                readings[name] = Reading(id(args[0]), rows // x.shape[0] if x.ndim > 1 else 1)

            handles.append(module.register_forward_pre_hook(before))
    try:
        with torch.no_grad(), torch.device("meta"):
            model(*positional, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return readings


def _candidates(model: nn.Module, config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments of `forward`, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    fixed: dict[str, Any] = {
        name: value for name in parameters if (value := _conditioning(name, config)) is not None
    }
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and "mask" in name:
            fixed[name] = _meta(1, _TEXT_TOKENS).bool()
    if "return_dict" in parameters:
        fixed["return_dict"] = False
    latents = next((name for name in parameters if _LATENTS.match(name)), None)
    text = next((name for name in parameters if _TEXT.match(name)), None)
    widths = _text_widths(config) if text else [0]
    for shape, width in itertools.product(_latent_shapes(config), widths):
        arguments = dict(fixed)
        if latents:
            arguments[latents] = _meta(*shape)
        if text:
            arguments[text] = _meta(1, _TEXT_TOKENS, width)
        yield arguments


def _conditioning(name: str, config: Mapping[str, Any]) -> Tensor | int | None:
    """What a conditioning argument of that name takes, where the name says it."""
    if _TIME.match(name):
        return _meta(1)
    if name == "guidance":
        return _meta(1) if config.get("guidance_embeds") else None
    if name in ("pooled_projections", "pooled_prompt_embeds"):
        width = config.get("pooled_projection_dim")
        return _meta(1, width) if isinstance(width, int) else None
    if name == "class_labels":
        return _meta(1).long()
    if name in ("num_frames", "height", "width"):
        return {"num_frames": 1, "height": _IMAGE_TOKENS // 8, "width": 8}[
            name
        ]  # as many tokens as are given
    if name in ("original_size", "target_size", "crop_coords"):
        return _meta(1, 2)
    if name in ("img_ids", "txt_ids"):
        axes = config.get("axes_dims_rope")
        tokens = _IMAGE_TOKENS if name == "img_ids" else _TEXT_TOKENS
        return _meta(tokens, len(axes)) if isinstance(axes, (list, tuple)) else None
    return None


def _latent_shapes(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Pictures, packed tokens and videos, with each width that the config may mean."""
    channels = [value for key in _CHANNEL_KEYS if isinstance(value := config.get(key), int)]
    channels += [width for width in _widths(config) if width not in channels]
    return [
        shape
        for width in channels[:6]
        for shape in (
            (1, _IMAGE_TOKENS, width),
            (1, width, _SIDE, _SIDE),
            (1, width, 4, _SIDE, _SIDE),
            (1, 4, width, _SIDE, _SIDE),
        )
    ]


def _text_widths(config: Mapping[str, Any]) -> list[int]:
    likely = [value for key, value in config.items() if _TEXT_KEY.search(key) and isinstance(value, int)]
    return list(dict.fromkeys([*likely, *_widths(config)]))[:8]


def _widths(config: Mapping[str, Any]) -> list[int]:
    """Numbers of the config that could be a width, the hidden size (heads times head width) first."""
    heads, head = config.get("num_attention_heads"), config.get("attention_head_dim")
    hidden = [heads * head] if isinstance(heads, int) and isinstance(head, int) else []
    found = [v for v in config.values() if isinstance(v, int) and not isinstance(v, bool) and v >= 4]
    return list(dict.fromkeys([*hidden, *found]))


def _meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
