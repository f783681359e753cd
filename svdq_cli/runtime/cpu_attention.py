"""Converted models on a CPU: attention by the engine, where it is faster than torch's.

diffusers' models call `F.scaled_dot_product_attention` in many places. While a converted model runs, calls of it that
suit the engine go there; all others, and everything under torch.compile, stay torch's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from svdq_cli.cpu.engine import engine
from svdq_cli.runtime import ops  # noqa: F401  defines torch.ops.svdq.cpu_attention

MOST_SIZE = 256  # of a head
# Products of queries, keys and head size below which a call costs more than it saves
WORTH_A_CALL = 2**20


def use_engine_attention(model: nn.Module) -> None:
    """From now on `model` attends on the engine, where that can: on processors with products of bfloat16 numbers."""
    if engine().has_attention:
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)


def attention_bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What `attn_mask` adds to the scores of every head and query: (B, N) float32, or None without one.

    ValueError for a mask that differs between heads or queries.
    """
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask[None]
    batches, heads, queries, keys = q.shape[0], *mask.shape[1:3], k.shape[2]
    if (heads > 1 and mask.stride(1)) or (queries > 1 and mask.stride(2)):
        raise ValueError("a mask that differs between heads or queries")
    alike = mask[:, 0, 0].expand(batches, keys)
    if alike.dtype == torch.bool:
        alike = torch.zeros_like(alike, dtype=torch.float32).masked_fill_(~alike, -torch.inf)
    return alike.float().contiguous()


class _EngineAttention(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if function is F.scaled_dot_product_attention and (found := _attended(*args, **given)) is not None:
            return found
        return function(*args, **given)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The engine's result; None where the call is not for it."""
    if is_causal or dropout_p or enable_gqa or not _suit(query, key, value):
        return None
    try:
        bias = attention_bias(attn_mask, query, key)
    except ValueError:
        return None
    return torch.ops.svdq.cpu_attention(
        query, key, value, bias, scale=query.shape[-1] ** -0.5 if scale is None else scale
    )


def _suit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    tensors = (q, k, v)
    return (
        all(
            each.dim() == 4
            and each.dtype == torch.bfloat16
            and each.device.type == "cpu"
            and each.stride(-1) == 1
            and not (each.requires_grad and torch.is_grad_enabled())
            for each in tensors
        )
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and k.shape[2] == v.shape[2] > 0
        and q.shape[3] == k.shape[3] == v.shape[3]
        and q.shape[3] % 2 == 0
        and q.shape[3] <= MOST_SIZE
        and q.shape[:3].numel() * k.shape[2] * q.shape[3] >= WORTH_A_CALL
    )


# Modes are a thread's own, as calls of a model are.
_entered = threading.local()


def _enter(model: nn.Module, arguments: object) -> None:
    if torch.compiler.is_compiling():
        return
    mode = _EngineAttention()
    mode.__enter__()
    _entered.modes = [*getattr(_entered, "modes", []), mode]


def _leave(model: nn.Module, arguments: object, found: object) -> None:
    if torch.compiler.is_compiling():
        return
    if modes := getattr(_entered, "modes", []):
        modes.pop().__exit__(None, None, None)
