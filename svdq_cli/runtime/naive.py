"""The baseline every evaluation shows: 4 bits without the paper's two ideas."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.records import W4A4Plan, W4A4Solution
from svdq_cli.solve.quantizers import quantize_weight


def naive_solution(plan: W4A4Plan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> W4A4Solution:
    """Round to nearest with absmax scales, no smoothing, rank 0. `weight` (N, K), any float dtype."""
    out_features, in_features = weight.shape
    quantized = quantize_weight(weight.float(), plan.precision, dtype=dtype)
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
