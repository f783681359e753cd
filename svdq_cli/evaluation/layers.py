"""How much of a layer's output survives its conversion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.errors import CheckFailedError
from svdq_cli.records import LayerSolution
from svdq_cli.runtime.cpu_fused import engine_linear
from svdq_cli.runtime.linear import quantized_linear

# Bounds of a ratio that JSON can't hold when signal or noise is zero; float32 outputs can't reach them
# otherwise.
SQNR_CAP_DB = 150.0


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """What a conversion moved into biases: the input of the converted layer is `mean` (K,) less, and what it should
    give on that has `bias` (N,) for its own."""

    mean: Tensor | None
    bias: Tensor | None


def layer_sqnr_db(
    weight: Tensor,
    bias: Tensor | None,
    solution: LayerSolution,
    rows: Tensor,
    *,
    moved: Moved | None = None,
    chunk: int = 1024,
) -> float:
    """Signal to quantization noise, 10 log10(sum y^2 / sum (y - y')^2), y the exact layer's output on `rows`.

    `weight` (N, K), `bias` (N,) or None, `rows` (M, K) raw activations: any float dtype, one device with the
    solution. `moved`: where the solution reads and gives other numbers. `chunk` rows at a time, sums in float64. The
    bias counts as signal. Bounded by +-SQNR_CAP_DB.
    Raises CheckFailedError, naming the layer, where an output is not finite.
    """
    signal = noise = 0.0
    converted = converted_layer(solution)
    weight32, bias32 = weight.float(), None if bias is None else bias.float()
    for part in rows.split(chunk):
        exact = F.linear(part.float(), weight32, bias32)
        signal += exact.double().square().sum().item()
        if moved is not None:
            part = part.float() if moved.mean is None else part.float() - moved.mean
            exact = F.linear(part, weight32, None if moved.bias is None else moved.bias.float())
        noise += (exact - converted(part.float())).double().square().sum().item()
    if not math.isfinite(signal) or not math.isfinite(noise):
        name = solution.plan.name
        whose = "converted" if math.isfinite(signal) else "16-bit"
        raise CheckFailedError(
            f"the {whose} layer {name} returns values that are not finite", where=name, kind="not-finite"
        )
    return ratio_db(signal, noise)


def converted_layer(solution: LayerSolution) -> nn.Module:
    """What the runtimes compute on rows (M, K) float32, rounded where they round: (M, N) float32."""
    return engine_linear(solution) or quantized_linear(solution)


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise) within +-SQNR_CAP_DB; the worst of it where the noise is not finite."""
    if not math.isfinite(noise):
        return -SQNR_CAP_DB
    if noise == 0:
        return SQNR_CAP_DB
    if signal == 0:
        return -SQNR_CAP_DB
    return max(-SQNR_CAP_DB, min(SQNR_CAP_DB, 10 * math.log10(signal / noise)))
