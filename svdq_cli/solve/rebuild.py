"""From a solution back to a weight, and how far that is from the original: what the self-check rests on."""

from __future__ import annotations

from torch import Tensor

from svdq_cli.records import LayerSolution, W4A4Solution, W4A16Solution
from svdq_cli.solve.modulation import dequantize_w4a16
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight


def relative_weight_error(solution: LayerSolution, weight: Tensor) -> float:
    """Relative Frobenius error of the rebuilt weight (N, K).

    A W4A4 layer is compared in smoothed coordinates (columns multiplied by its smoothing factor), where rounding is
    uniform: there 4-bit rounding costs 0.05 to 0.25 whatever the smoothing, while a factor used upside down, a wrong
    permutation or a foreign weight cost 1 or more.
    """
    match solution:
        case W4A4Solution():
            smooth = solution.smooth.float()
            quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
            rebuilt = dequantize_weight(quantized, solution.plan.precision)
            rebuilt = rebuilt + (solution.up.float() @ solution.down.float()) * smooth
            exact = weight.float() * smooth
        case W4A16Solution():
            rebuilt, exact = dequantize_w4a16(solution), weight.float()
    return float((rebuilt - exact).norm() / exact.norm().clamp(min=1e-30))
