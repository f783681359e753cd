"""ConvRot: inputs rotated by Hadamard matrices before they are quantized, as comfy-kitchen's operators compute it.

    y = x W^T + b = (x H)(W H)^T + b  ~  qa(x H) . dequant(Q)^T + b

H is block-diagonal: every `rotation` inputs side by side are multiplied by one regular Hadamard matrix, which is
symmetric and its own inverse. What single channels hold is spread over all of a block, so one scale a token serves all
of its numbers, and one scale a row those of the weight (ConvRot, arXiv 2512.03673).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from svdq_cli.records import LEVELS, RotatedSolution

MOST = 7  # codes of weights and of 4-bit activations: -7..7
MOST_8_BIT = 127


@cache
def hadamard(size: int) -> Tensor:
    """The normalized regular Hadamard matrix (K, K) float32, symmetric and orthogonal. `size`: K, a power of 4."""
    least = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32)
    matrix = least
    while len(matrix) < size:
        matrix = torch.kron(matrix, least)
    if len(matrix) != size:
        raise ValueError(f"{size} is not a power of 4")
    return matrix / size**0.5


def rotate(matrix: Tensor, rotation: int) -> Tensor:
    """x H of activations (M, K) or W H of a weight (N, K), float32; twice is what there was before."""
    blocks = matrix.float().unflatten(-1, (-1, rotation))
    return (blocks @ hadamard(rotation).to(matrix.device)).flatten(-2)


def quantize_rows(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Codes (M, K) float32 in -most..most of rotated activations (M, K), and their scales (M, 1) float32."""
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / most
    return torch.round(x / scales).clamp_(-most, most), scales


def fake_quantize_rows(x: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize rotated activations (M, K), one scale a row. (M, K) float32."""
    codes, scales = quantize_rows(x.float(), MOST if bits == 4 else MOST_8_BIT)
    return codes.mul_(scales)


def levels_of(codes: Tensor, scales: Tensor) -> Tensor:
    """The 8-bit integers of a weight with 8-bit activations, (N, ...) float32: `codes` 0..15 (N, ...) with the scale,
    of the same shape or one that broadcasts, that their group has."""
    table = torch.tensor(LEVELS, device=codes.device, dtype=torch.float32)
    return (table[codes.long()] * scales.float()).round_().clamp_(-MOST_8_BIT, MOST_8_BIT)


def rotated_weight(solution: RotatedSolution) -> Tensor:
    """The stored weight (N, K) float32 in rotated coordinates."""
    if solution.row_scales is None:
        return solution.codes.float() * solution.scales
    group = solution.plan.group
    groups = solution.codes.unflatten(-1, (-1, group))
    integers = levels_of(groups, solution.scales.float().unsqueeze(-1)).flatten(-2)
    return integers * solution.row_scales.unsqueeze(1)
