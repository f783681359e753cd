"""Attention on the CPU engine."""

from __future__ import annotations

from torch import Tensor

from svdq_cli.cpu.engine import new_attention
from svdq_cli.runtime.ops.define import define_cpu


def _shapes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    return new_attention(q)


define_cpu(
    "attention", "Tensor q, Tensor k, Tensor v, Tensor? bias, *, float scale", "Tensor", shapes=_shapes
)
