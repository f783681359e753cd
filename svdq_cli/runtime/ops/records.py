"""What the operators of W4A4 layers pass on: NamedTuples, because torch's operators take single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from svdq_cli.pack.kernel_tiles import STEP

Quantized = tuple[Tensor, Tensor, Tensor]  # packed codes, scales, hidden


class Product(NamedTuple):
    """What a product reads of its layer. Shapes: `pack.kernel_tiles`, with N padded to whole blocks (NP), R to 16."""

    weight: Tensor
    weight_scales: Tensor
    up: Tensor
    outer: Tensor | None  # (NP,) float32, nvfp4 only
    bias: Tensor | None  # (NP,) 16-bit


class InputOperands(NamedTuple):
    """What a layer quantizes its input with."""

    inverse_smooth: Tensor  # (K,) float32
    down: Tensor


# The schema's part for one layer's `Quantized` and `Product`.
LAYER = (
    "Tensor codes, Tensor scales, Tensor hidden, Tensor weight, Tensor weight_scales, Tensor up, Tensor? outer, "
    "Tensor? bias"
)


def layer_records(tensors: Sequence[Tensor]) -> tuple[Quantized, Product]:
    """The records of an operator's first eight parameters, those of `LAYER`: packed (M, K) codes, (N, K) weights."""
    codes, scales, hidden, *product = tensors[:8]
    return (codes, scales, hidden), Product(*product)


def sizes_of(quantized: Quantized, product: Product) -> tuple[int, int, int, int]:
    """MP, NP, K and R, as the tensors are padded."""
    codes = quantized[0]
    return 16 * codes.shape[1], 16 * product.weight.shape[1], STEP * codes.shape[0], 16 * product.up.shape[0]
