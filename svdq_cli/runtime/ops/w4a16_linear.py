"""A W4A16 layer: 4-bit weights with 16-bit activations, for layers that see few rows."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.gpu import variants
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher, aligned
from svdq_cli.gpu.variants import variant_of
from svdq_cli.pack.kernel_tiles import STEP, unpack_w4a16_weight
from svdq_cli.pack.padding import ceil_div
from svdq_cli.runtime.ops.define import define, define_cpu


@functools.cache
def variant(dtype: torch.dtype) -> Variant:
    return variant_of("w4a16_linear", dtype, COLUMNS=variants.W4A16_COLUMNS, WARPS=variants.W4A16_WARPS)


def launch(
    launcher: Launcher, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, n: int
) -> Tensor:
    """kernels/w4a16_linear.cu. `x` (M, K) contiguous; returns y (M, N)."""
    m, k = x.shape
    np = 16 * weight.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    launcher.launch(
        variant(x.dtype),
        (np // variants.W4A16_COLUMNS, ceil_div(m, 16), 1),
        variants.W4A16_WARPS * variants.LANES,
        *(aligned(x), weight, scales, bias, y, m, n, np, k),
    )
    return y


def reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, n: int) -> Tensor:
    """`x` (M, K) -> (M, N). Each weight is one fma of codes, scale and zero, rounded to 16 bits."""
    groups = unpack_w4a16_weight(weight).double().unflatten(-1, (-1, STEP))
    scale, zero = scales.double().permute(2, 1, 0).unsqueeze(-1)
    values = (groups * scale + zero).flatten(-2).to(x.dtype)
    y = F.linear(x.float(), values.float())
    if bias is not None:
        y = y + bias.float()
    return y[:, :n].to(x.dtype)


def _shapes(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, n: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


_PARAMETERS = "Tensor x, Tensor weight, Tensor scales, Tensor? bias, *, SymInt n"
define(
    "w4a16_linear",
    _PARAMETERS,
    "Tensor",
    launch=launch,
    reference=reference,
    shapes=_shapes,
)
define_cpu("w4a16_linear", _PARAMETERS, "Tensor", shapes=_shapes)
