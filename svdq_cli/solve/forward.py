"""What a solution computes, in float32, for the search to score; and the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import W4A4Solution
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight, fake_quantize_activation, row_blocks

_TINY = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class SourceWeight:
    """One linear of the 16-bit model, in float32 on the device that solves."""

    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)


def dequantized_weight(solution: W4A4Solution) -> Tensor:
    """The 4-bit part, (N, K) float32, in smoothed coordinates."""
    quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
    return dequantize_weight(quantized, solution.plan.precision)


def w4a4_output(x: Tensor, solution: W4A4Solution) -> Tensor:
    """What the solution's 4-bit layer computes for `x` (M, K) float32, without the final rounding and the bias."""
    quantized = fake_quantize_activation(x / solution.smooth.float(), solution.plan.precision)
    return quantized @ dequantized_weight(solution).T + (x @ solution.down.float().T) @ solution.up.float().T


def relative_errors(
    x: Tensor, solutions: Mapping[str, W4A4Solution], weights: Mapping[str, SourceWeight]
) -> dict[str, float]:
    """Noise over signal of each layer's output on rows `x` (M, K), all of which they share."""
    errors: dict[str, float] = {}
    for name, solution in solutions.items():
        exact = x @ weights[name].weight.T
        errors[name] = float(
            (w4a4_output(x, solution) - exact).square().sum() / (exact.square().sum() + _TINY)
        )
    return errors


def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum y^2 / sum (y - y')^2), in dB; 150 for no error at all."""
    signal = noise = torch.zeros((), dtype=torch.float64, device=exact.device)
    for rows in row_blocks(exact):
        wanted = exact[rows].double()
        signal = signal + wanted.square().sum()
        noise = noise + (wanted - approximate[rows].double()).square().sum()
    return decibels(signal, noise)


def decibels(signal: Tensor, noise: Tensor) -> float:
    """10 log10(signal / noise) of two sums of squares; 150 for no noise at all."""
    return float(10 * torch.log10((signal + _TINY) / (noise + _TINY)).clamp(max=150.0))
