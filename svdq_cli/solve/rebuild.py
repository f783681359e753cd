"""From a solution back to a weight, and how far that is from the original: what the self-check rests on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from svdq_cli.records import LayerSolution, W4A4Solution, W4A16Solution
from svdq_cli.solve.modulation import dequantize_w4a16
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight


@dataclass(frozen=True, slots=True)
class WeightError:
    """Distance of a rebuilt weight from the original.

    W4A4 layers are compared in smoothed coordinates (columns multiplied by the smoothing factor), where rounding is
    uniform: rounding to nearest costs 0.29 steps RMS in every column, GPTQ about twice that in the worst. A smoothing
    factor used upside down, a wrong permutation or a foreign weight cost several steps.
    """

    relative: float  # Frobenius norm of the error over that of the weight
    steps: float  # RMS over the layer, in quantization steps (group scales)
    worst_column_steps: float  # RMS of the worst input channel


def weight_error(solution: LayerSolution, weight: Tensor) -> WeightError:
    """`weight` (N, K): the 16-bit layer's."""
    match solution:
        case W4A4Solution():
            smooth = solution.smooth.float()
            quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
            branch = (solution.up.float() @ solution.down.float()) * smooth
            rebuilt = dequantize_weight(quantized, solution.plan.precision) + branch
            exact = weight.float() * smooth
            step = solution.scales.float() if solution.outer is None else _outer_scales(solution)
        case W4A16Solution():
            rebuilt, exact = dequantize_w4a16(solution), weight.float()
            step = solution.scales.float()
    error = rebuilt - exact
    in_steps = (error.reshape(*step.shape, -1) / step.unsqueeze(-1)).reshape(error.shape)
    return WeightError(
        relative=float(error.norm() / exact.norm().clamp(min=1e-30)),
        steps=float(in_steps.square().mean().sqrt()),
        worst_column_steps=float(in_steps.square().mean(0).max().sqrt()),
    )


def bias_error(solution: LayerSolution, bias: Tensor | None) -> float:
    """Relative error of the stored bias, 0 for a layer without one."""
    if solution.bias is None or bias is None:
        return 0.0 if solution.bias is None and bias is None else 1.0
    return float((solution.bias.float() - bias.float()).norm() / bias.float().norm().clamp(min=1e-30))


def _outer_scales(solution: W4A4Solution) -> Tensor:
    assert solution.outer is not None
    return solution.scales.float() * solution.outer.float().reshape(-1, 1)
