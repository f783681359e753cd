"""What the operators of W4A4 layers pass on: NamedTuples, because torch's operators take single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from svdq_cli.errors import UsageError
from svdq_cli.pack.kernel_tiles import STEP

# Words of an operand's codes: kernels/gemm_pipeline.cuh counts vectors of four of them in 32 bits.
MOST_WORDS = 2**33

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
    """MP, NP, K and R, as the tensors are padded. Raises UsageError for an operand that the kernels can't index."""
    codes = quantized[0]
    for packed in (codes, product.weight):
        if packed.numel() > MOST_WORDS:
            raise UsageError(
                f"an operand of {8 * packed.numel():,} codes: the kernels index at most {8 * MOST_WORDS:,}",
                hint="call the layer on fewer rows at a time",
            )
    return 16 * codes.shape[1], 16 * product.weight.shape[1], STEP * codes.shape[0], 16 * product.up.shape[0]
