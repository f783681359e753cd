"""The baseline every evaluation shows: 4 bits without the paper's two ideas."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision, RotatedPlan, RotatedSolution, W4A4Plan, W4A4Solution
from svdq_cli.solve.quantizers import QuantizedWeight, absmax, quantize_weight
from svdq_cli.solve.rotation import MOST, quantize_rows, rotate


def naive_solution(plan: W4A4Plan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> W4A4Solution:
    """Round to nearest with absmax scales, no smoothing, rank 0. `weight` (N, K), any float dtype."""
    out_features, in_features = weight.shape
    quantized = published_rounding(weight.float(), plan.precision, dtype=dtype)
    return W4A4Solution(
        plan=replace(plan, rank=0),
        smooth=weight.new_ones(in_features, dtype=dtype),
        down=weight.new_zeros(0, in_features, dtype=dtype),
        up=weight.new_zeros(out_features, 0, dtype=dtype),
        codes=quantized.codes,
        scales=quantized.scales,
        outer=quantized.outer,
        bias=None if bias is None else bias.to(dtype),
    )


def naive_rotated(
    plan: RotatedPlan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> RotatedSolution:
    """Rotated, rounded to nearest with absmax scales of rows, 4-bit activations: what comfy-kitchen's own quantizer
    makes of a weight. `weight` (N, K), any float dtype."""
    codes, scales = quantize_rows(rotate(weight, plan.rotation), MOST)
    return RotatedSolution(
        plan=replace(plan, activation_bits=4),
        codes=codes.to(torch.int8),
        scales=scales,
        row_scales=None,
        bias=None if bias is None else bias.to(dtype),
    )


def published_rounding(weight: Tensor, precision: Precision, *, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest as other exporters do it: int4 codes -7 to 7 with scales (N, K/G) above zero, nvfp4
    with the scale that makes a group's largest weight 6. Loses more than
    svdq's own rounding (`quantize_weight`). `weight` (N, K) float32."""
    match precision:
        case Int4(group=group):
            groups = weight.unflatten(1, (-1, group))
            scales = (absmax(groups) / 7).to(dtype)
            scales.masked_fill_(scales == 0, 1)
            codes = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-7, 7)
            return QuantizedWeight(codes.flatten(1).to(torch.int8), scales, None)
        case NvFp4():
            return quantize_weight(weight, precision, dtype=dtype, nvfp4_shares=(1.0,))
