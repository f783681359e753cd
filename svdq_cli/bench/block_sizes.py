"""The GEMM alone in blocks of either size: which of the two predictions of `variants.STEP_CYCLES` holds on a card."""

from __future__ import annotations

import torch

from svdq_cli.bench.report import Microseconds
from svdq_cli.bench.shapes import LinearShape
from svdq_cli.bench.step import random_w4a4
from svdq_cli.bench.timing import copies_beyond_cache, measure
from svdq_cli.gpu import variants
from svdq_cli.gpu.launcher import Launcher
from svdq_cli.records import Precision
from svdq_cli.runtime import ops
from svdq_cli.runtime.fused import FusedW4A4Linear
from svdq_cli.runtime.ops.records import Product


def block_sizes(precision: Precision, launcher: Launcher) -> tuple[int, ...]:
    """Rows of the blocks that a card has for this precision, apart from the small ones."""
    large = variants.has_large_blocks(precision, launcher.architecture)
    return (variants.BLOCK_M, variants.LARGE_BLOCK_M) if large else (variants.BLOCK_M,)


def time_blocks(
    shape: LinearShape,
    precision: Precision,
    *,
    rank: int,
    block_m: int,
    launcher: Launcher,
    device: torch.device,
    seconds: float = 0.2,
) -> Microseconds:
    """Of one product with its branch and bias, on operands that no cache holds."""
    layers = [FusedW4A4Linear(random_w4a4(shape.k, shape.n, rank, precision, device))]
    x = torch.randn(shape.m, shape.k, device=device, dtype=layers[0].up.dtype)
    read = sum(t.nbytes for t in (*layers[0].quantize(x), *layers[0].product) if t is not None)
    for _ in range(copies_beyond_cache(read, device) - 1):
        layers.append(FusedW4A4Linear(random_w4a4(shape.k, shape.n, rank, precision, device)))
    operands = [(layer.quantize(x), Product(*layer.product)) for layer in layers]  # type: ignore[arg-type]

    def call(quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor], product: Product) -> torch.Tensor:
        how = {"m": shape.m, "n": shape.n, "precision": precision}
        return ops.w4a4_gemm.launch(launcher, quantized, product, **how, block_m=block_m)

    calls = [lambda pair=pair: call(*pair) for pair in operands]
    return measure(calls, seconds=seconds, device=device)
