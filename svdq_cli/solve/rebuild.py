"""From a solution back to a weight, and how far that is from the original: what the self-check rests on."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from svdq_cli.records import LayerSolution, W4A4Solution, W4A16Solution
from svdq_cli.solve.modulation import dequantize_w4a16
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far a rebuilt weight is from the original.

    W4A4 layers are compared in smoothed coordinates (columns multiplied by the smoothing factor), where rounding is
    uniform. The search moves a weight on purpose (GPTQ, block reconstruction), so a distance alone tells little; but it
    never turns one away from the original, as a wrong permutation, a smoothing factor used upside down or a foreign
    weight do.
    """

    relative: float  # Frobenius norm of the error over that of the weight
    # Cosine between the 4-bit part and what it stands for: the weight less its low-rank branch.
    agreement: float
    strayed_rows: float  # share of output rows whose own cosine is that of unrelated numbers
    # How the columns' gains follow the smoothing factor: 0 as they should, -2 where it is inverted.
    smooth_slope: float


def rebuilt_weight(solution: LayerSolution) -> Tensor:
    """The 16-bit weight that a solution stands for, (N, K) float32, in the coordinates of the raw activation."""
    match solution:
        case W4A4Solution():
            quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
            four_bit = dequantize_weight(quantized, solution.plan.precision) / solution.smooth.float()
            return four_bit + solution.up.float() @ solution.down.float()
        case W4A16Solution():
            return dequantize_w4a16(solution)


def weight_error(solution: LayerSolution, weight: Tensor) -> WeightError:
    """`weight` (N, K): the 16-bit layer's."""
    match solution:
        case W4A4Solution():
            smooth = solution.smooth.float()
            quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
            exact = weight.float() * smooth
            stands_for = exact - (solution.up.float() @ solution.down.float()) * smooth
            four_bit = dequantize_weight(quantized, solution.plan.precision)
            slope = _smooth_slope(four_bit, stands_for, smooth)
        case W4A16Solution():
            four_bit, exact = dequantize_w4a16(solution), weight.float()
            stands_for, slope = exact, 0.0
    unrelated = 3 / four_bit.shape[1] ** 0.5  # three standard deviations of the cosine of random vectors
    by_row = F.cosine_similarity(four_bit, stands_for, dim=1, eps=1e-30)
    empty = (four_bit == 0).all(1) | (stands_for == 0).all(1)
    return WeightError(
        relative=float((four_bit - stands_for).norm() / exact.norm().clamp(min=1e-30)),
        agreement=1.0 if bool(empty.all()) else _cosine(four_bit, stands_for),
        strayed_rows=float(((by_row < unrelated) & ~empty).float().mean()),
        smooth_slope=slope,
    )


def _smooth_slope(four_bit: Tensor, stands_for: Tensor, smooth: Tensor) -> float:
    """Slope of log gain against log smooth over input channels; the gain of a column is its regression on what it
    stands for. A file whose smoothing factor is s' where its codes were made with s has gains s / s'."""
    gain = (four_bit * stands_for).sum(0) / stands_for.square().sum(0).clamp(min=1e-30)
    known = gain > 0.01  # dead channels say nothing
    if int(known.sum()) < 2:
        return 0.0
    x, y = smooth[known].double().log(), gain[known].double().log()
    x = x - x.mean()
    spread = float(x.square().mean())
    # a spread below 3 % is that of a factor which is 1 but for rounding, and can be turned around without harm
    return 0.0 if spread < 1e-3 else float((x * y).mean()) / spread


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum() / (one.double().norm() * other.double().norm()))


def bias_error(solution: LayerSolution, bias: Tensor | None) -> float:
    """Relative error of the stored bias, 0 for a layer without one."""
    if solution.bias is None or bias is None:
        return 0.0 if solution.bias is None and bias is None else 1.0
    return float((solution.bias.float() - bias.float()).norm() / bias.float().norm().clamp(min=1e-30))
