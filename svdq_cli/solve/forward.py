"""What a solution computes, in float32, for the search to score; and the score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import LayerSolution, RotatedSolution, W4A4Plan, W4A4Solution, W4A16Solution
from svdq_cli.solve.modulation import dequantize_w4a16
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight, fake_quantize_activation, row_blocks
from svdq_cli.solve.rotation import fake_quantize_rows, rotate, rotated_weight

# Calibration rows whose outputs are in memory at a time. A constant, and not what happens to fit: products of other
# shapes are added up in another order, and the figures would depend on the machine's free memory.
ROWS_AT_ONCE = 512
MEASURED_ROWS = (
    1024  # of the calibration rows, for a report's SQNR: all of them move a layer's by less than 0.2 dB
)
MOST_DB = 150.0  # bounds of a ratio that JSON can't hold when the noise is zero or infinite
_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """One linear of the 16-bit model, in float32 on the device that solves."""

    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)


def dequantized_weight(solution: W4A4Solution) -> Tensor:
    """The 4-bit part, (N, K) float32, in smoothed coordinates."""
    quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
    return dequantize_weight(quantized, solution.plan.precision)


def stacked_weights(plans: Sequence[W4A4Plan], weights: Mapping[str, LinearWeights]) -> Tensor:
    """The layers' weights under one another, (sum of N, K). Each is asked for when its turn has come, so that no more
    than one is in memory in addition to what is returned."""
    stack: Tensor | None = None
    row = 0
    for plan in plans:
        weight = weights[plan.name].weight
        if stack is None:
            stack = weight.new_empty(sum(each.linear.out_features for each in plans), weight.shape[1])
        stack[row : row + len(weight)] = weight
        row += len(weight)
        del weight
    assert stack is not None
    return stack


def relative_errors(
    x: Tensor,
    solutions: Mapping[str, LayerSolution],
    weights: Mapping[str, LinearWeights],
    mean: Tensor | None = None,
) -> dict[str, float]:
    """Noise over signal of each layer's output on rows `x` (M, K), all of which they share. `mean` (K,): what `x` is
    less than the input whose output is the signal."""
    errors: dict[str, float] = {}
    for name, solution in solutions.items():
        signal, noise = _output_sums(x, weights[name].weight, output_of(solution), mean=mean)
        errors[name] = float(noise / (signal + _TINY))
    return errors


def output_sqnr_db(x: Tensor, weight: Tensor, solution: LayerSolution, mean: Tensor | None = None) -> float:
    """Signal to quantization noise of a layer's output on rows `x` (M, K), in dB, with the rounding of the runtimes;
    `weight` (N, K) is the 16-bit layer's. `mean` as in `relative_errors`."""
    bias = 0.0 if solution.bias is None else solution.bias.float()
    return decibels(*_output_sums(x, weight, output_as_run(solution), bias, mean=mean))


def output_as_run(solution: LayerSolution) -> Callable[[Tensor], Tensor]:
    """The layer's output (M, N) float32 for rows (M, K) float32, as the runtimes round it: rows, hidden vector and
    result are 16-bit, and so a number that 16 bits do not hold is infinite. With the bias."""
    match solution:
        case W4A4Solution():
            dtype, precision = solution.up.dtype, solution.plan.precision
            smooth, four_bit = solution.smooth.to(dtype), dequantized_weight(solution)
            down, up = solution.down.float(), solution.up.float()

            def output(x: Tensor) -> Tensor:
                rows = x.to(dtype)
                y = fake_quantize_activation(rows / smooth, precision) @ four_bit.T
                if up.shape[1]:
                    y = y + (rows.float() @ down.T).to(dtype).float() @ up.T
                return _rounded(y, solution.bias, dtype)

            return output
        case W4A16Solution():
            dtype = solution.scales.dtype
            rebuilt = dequantize_w4a16(solution).to(dtype).float()
            return lambda x: _rounded(x.to(dtype).float() @ rebuilt.T, solution.bias, dtype)
        case RotatedSolution():
            product, dtype = output_of(solution), sixteen_bit_of(solution, torch.bfloat16)
            return lambda x: _rounded(product(x.to(dtype).float()), solution.bias, dtype)


def sixteen_bit_of(solution: RotatedSolution, otherwise: torch.dtype) -> torch.dtype:
    """What a rotated layer's results are rounded to: its scales are float32 and float8, so only a bias says it."""
    return otherwise if solution.bias is None else solution.bias.dtype


def _rounded(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.float()).to(dtype).float()


def output_of(solution: LayerSolution) -> Callable[[Tensor], Tensor]:
    """The layer's output (M, N) for rows (M, K) float32, without the final rounding and the bias."""
    match solution:
        case W4A4Solution():
            smooth, precision = solution.smooth.float(), solution.plan.precision
            four_bit, down, up = dequantized_weight(solution), solution.down.float(), solution.up.float()

            def output(x: Tensor) -> Tensor:
                quantized = fake_quantize_activation(x / smooth, precision)
                return quantized @ four_bit.T + (x @ down.T) @ up.T

            return output
        case W4A16Solution():
            rebuilt = dequantize_w4a16(solution)
            return lambda x: x @ rebuilt.T
        case RotatedSolution(plan=plan):
            rotated = rotated_weight(solution)
            return lambda x: fake_quantize_rows(rotate(x, plan.rotation), plan.activation_bits) @ rotated.T


def _output_sums(
    x: Tensor,
    weight: Tensor,
    output: Callable[[Tensor], Tensor],
    bias: Tensor | float = 0.0,
    *,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of y^2, sum of (y' - y - bias)^2) over the outputs of rows `x`, exact y and the solution's y'; y^2 of rows
    that are `mean` more. float64."""
    signal = noise = torch.zeros((), dtype=torch.float64, device=x.device)
    moved = None if mean is None else mean.to(x.device) @ weight.T
    for rows in x.split(ROWS_AT_ONCE):
        of_signal, of_noise = _square_sums(rows @ weight.T, output(rows) - bias, moved)
        signal, noise = signal + of_signal, noise + of_noise
    return signal, noise


def _square_sums(exact: Tensor, approximate: Tensor, moved: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of (y + moved)^2, sum of (y' - y)^2), float64, some rows at a time."""
    signal = noise = torch.zeros((), dtype=torch.float64, device=exact.device)
    for rows in row_blocks(exact):
        wanted = exact[rows].double()
        signal = signal + (wanted if moved is None else wanted + moved.double()).square().sum()
        noise = noise + (wanted - approximate[rows].double()).square().sum()
    return signal, noise


def decibels(signal: Tensor, noise: Tensor) -> float:
    """10 log10(signal / noise) of two sums of squares; 150 for no noise at all, -150 for an output that is not
    finite. Each a scalar."""
    if not bool(torch.isfinite(noise)):
        return -MOST_DB
    return float(10 * torch.log10((signal + _TINY) / (noise + _TINY)).clamp(max=MOST_DB))
