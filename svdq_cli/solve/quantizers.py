"""The 4-bit number formats, as the runtimes define them: weights (what a checkpoint stores) and activations (what the
kernels do on the fly).

Sources: SVDQuant (arXiv 2411.05007); number formats as read by Nunchaku and diffusers' `nunchaku_lite`:
int4 has one 16-bit scale of either sign per 64 inputs; nvfp4 is E2M1 with one e4m3 micro scale per 16 inputs and a
16-bit outer scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitude of codes 0..7; codes 8..15 are the negatives
INT4_LEAST, INT4_MOST = -8, 7  # codes of weights
# Of the scale with which a group's largest weight just becomes -8. Rounded to nearest, trained weights lose least with
# 0.95 of it: a few are clipped, the many others gain resolution.
INT4_SHARE = 0.95
# Of the micro scale with which a group's largest weight just becomes 6. At 1.5 times that it becomes 4, where E2M1 is
# half as coarse (Four Over Six, arXiv 2512.02010): each group takes the one that loses least.
NVFP4_SHARES = (1.0, 1.5, 1.2, 0.9)
NVFP4_PIECES = 3  # of a block, one after the other: what is tried and compared takes memory
BLOCK = 1 << 19  # numbers that are worked on at a time
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # the smallest positive e4m3 number; a micro scale of zero would divide zero by zero


class Rows(Protocol):
    """A matrix (N, K) whose rows can be had some at a time: a tensor, or one that is computed when it is asked for."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """W = codes * scales * outer. All in stored dtypes."""

    codes: Tensor  # (N, K) int8: int4 in [-8, 7], nvfp4 nibbles 0..15
    scales: Tensor  # (N, K/G)
    outer: Tensor | None  # nvfp4: (1,) or (N,)


def quantize_weight(
    weight: Rows,
    precision: Precision,
    *,
    dtype: torch.dtype,
    nvfp4_shares: tuple[float, ...] = NVFP4_SHARES,
) -> QuantizedWeight:
    """Round to nearest. `weight` (N, K) float32, `dtype` the stored 16-bit dtype. Rows are asked for
    once for int4 and twice for nvfp4, whose outer scale is that of the whole."""
    quantized = empty_quantized(weight, precision, dtype=dtype)
    for rows in row_blocks(weight):
        quantize_rows(weight[rows], quantized, rows, precision, nvfp4_shares=nvfp4_shares)
    return quantized


def dequantize_weight(quantized: QuantizedWeight, precision: Precision) -> Tensor:
    """(N, K) float32. Exact: every factor has few enough bits for the product to fit float32."""
    scales = quantized.scales.float()
    match precision:
        case Int4():
            values = quantized.codes.float()
        case NvFp4():
            values = decode_e2m1(quantized.codes)
            assert quantized.outer is not None
            scales = scales * quantized.outer.float().reshape(-1, 1)
    return (_grouped(values, precision.group) * scales.unsqueeze(-1)).reshape(values.shape)


def fake_quantize_weight(weight: Tensor, precision: Precision, *, dtype: torch.dtype) -> Tensor:
    """Quantize and dequantize, (N, K) float32, for scoring: as `quantize_weight`, but nvfp4 with the scale alone with
    which a group's largest weight becomes 6, and with ties to even."""
    groups = _grouped(weight, precision.group)
    match precision:
        case Int4():
            scale = int4_scales(int4_extremes(groups), dtype).unsqueeze(-1).float()
            rounded = torch.round(groups / scale).clamp_(INT4_LEAST, INT4_MOST)
            scale = fitted_scales(groups, rounded, scale, dtype)
        case NvFp4():
            peak = absmax(groups).unsqueeze(-1)
            outer = (
                (peak.max() / (6 * E4M3_MAX)).clamp(min=torch.finfo(dtype).smallest_normal).to(dtype).float()
            )
            micro = (peak / 6 / outer).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).float()
            scale = micro * outer
            rounded = round_e2m1_to_even(groups / scale)
    return (rounded * scale).reshape(weight.shape)


def quantize_activation(x: Tensor, precision: Precision, *, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Dynamic per-token group quantization as the kernels do it.

    `x` (M, K), already smoothed. Returns (codes (M, K) float32 *values*, scales (M, K/G) float32). The codes are chosen
    with the unrounded float32 scale; the returned scale is rounded to how the kernel keeps it (int4: x.dtype where
    that is a 16-bit type; nvfp4: e4m3).
    """
    groups = _grouped(x.float(), precision.group)
    peak = absmax(groups).unsqueeze(-1)
    match precision:
        case Int4():
            scale = peak * torch.tensor(1 / 15 if unsigned else 1 / 7, dtype=torch.float32)
            codes = torch.round(groups * _reciprocal(scale))
            codes = codes.clamp(0, 15) if unsigned else codes.clamp(-8, 7)
            kept = scale.to(x.dtype).float()
        case NvFp4():
            scale = (peak * torch.tensor(1 / 6, dtype=torch.float32)).clamp(max=E4M3_MAX)
            codes = round_e2m1_to_even(groups * _reciprocal(scale))
            kept = scale.to(torch.float8_e4m3fn).float()
    return codes.reshape(x.shape), kept.squeeze(-1)


def fake_quantize_activation(x: Tensor, precision: Precision, *, unsigned: bool = False) -> Tensor:
    """Quantize and dequantize. (M, K) float32."""
    codes, scales = quantize_activation(x, precision, unsigned=unsigned)
    return (_grouped(codes, precision.group) * scales.unsqueeze(-1)).reshape(x.shape)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Nibbles 0..15 -> float32 values. Of any shape, which stays."""
    # float16 has the same fields, only wider: sign, exponent and mantissa are moved to their places there, and the
    # exponents' offsets differ by 14. Faster than a table, which would be indexed with 64-bit integers.
    bits = codes.to(torch.int16)
    sign, magnitude = (bits & 8) << 12, (bits & 7) << 9
    return (sign | magnitude).view(torch.float16).float().mul_(2.0**14)


def encode_e2m1(values: Tensor) -> Tensor:
    """Nearest E2M1 nibble; ties go to the smaller magnitude and zero is always code 0 (as checkpoints store it). Of
    any shape, which stays."""
    magnitude = values.abs()
    above_two, above_four = magnitude >= 2, magnitude >= 4
    # In steps of 0.5, 1 and 2; less half a step and up, a value on a midpoint goes to the smaller neighbor. Numbers of
    # steps and codes of the two coarser ranges differ by 2 each.
    steps = (magnitude / _e2m1_step(above_two, above_four)).sub_(0.5).ceil_()
    codes = steps.add_(above_two, alpha=2).add_(above_four, alpha=2).clamp_(0, 7)
    return codes.add_((values < 0) & (codes > 0), alpha=8).to(torch.int8)


def round_e2m1_to_even(values: Tensor) -> Tensor:
    """E2M1 values by round-to-nearest-even, saturating: what the GPU's conversion does to activations. Of any shape,
    which stays."""
    magnitude = values.abs()
    step = _e2m1_step(magnitude >= 2, magnitude >= 4)
    return torch.copysign(magnitude.div_(step).round_().mul_(step).clamp_(max=6.0), values)


def _e2m1_step(above_two: Tensor, above_four: Tensor) -> Tensor:
    """The step between neighboring E2M1 values: 0.5 below 2, 1 below 4, then 2. A power of two: dividing is exact."""
    return above_two.float().add_(above_four, alpha=2.0).add_(1.0).mul_(0.5)


def row_blocks(matrix: Rows) -> Iterator[slice]:
    """Slices that cover the rows, of about BLOCK numbers each: what is done block by block stays in the cache, and
    takes little memory in addition to the matrix."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step)


def empty_quantized(weight: Rows, precision: Precision, *, dtype: torch.dtype) -> QuantizedWeight:
    """Room for the codes and scales of a weight (N, K), which `quantize_rows` fills. nvfp4's outer scale is there
    already: it is that of the whole."""
    n, k = weight.shape
    return QuantizedWeight(
        torch.empty(n, k, dtype=torch.int8, device=weight.device),
        torch.empty(
            n,
            k // precision.group,
            dtype=dtype if isinstance(precision, Int4) else torch.float8_e4m3fn,
            device=weight.device,
        ),
        None if isinstance(precision, Int4) else outer_scale(weight, dtype),
    )


def quantize_rows(
    values: Tensor,
    quantized: QuantizedWeight,
    rows: slice,
    precision: Precision,
    *,
    nvfp4_shares: tuple[float, ...] = NVFP4_SHARES,
) -> Tensor:
    """Rounds some rows of a weight, `values` (n, K) float32, to nearest. Codes and scales are put into `quantized` (of
    `empty_quantized`); returns what they represent, (n, K) float32. `nvfp4_shares`: the micro scales to choose from, as
    shares of the one with which a group's largest weight becomes 6."""
    groups = _grouped(values, precision.group)
    match precision:
        case Int4():
            dtype = quantized.scales.dtype
            scale = int4_scales(int4_extremes(groups), dtype).unsqueeze(-1).float()
            codes = (groups / scale).round_().clamp_(INT4_LEAST, INT4_MOST)
            scale = fitted_scales(groups, codes, scale, dtype)
            quantized.codes[rows] = codes.flatten(-2)
            quantized.scales[rows] = scale.squeeze(-1).to(dtype)
            return codes.mul_(scale).flatten(-2)
        case NvFp4():
            assert quantized.outer is not None
            outer, found = quantized.outer.float(), torch.empty_like(values)
            step = max(1, len(values) // NVFP4_PIECES)
            for start in range(0, len(values), step):
                piece = slice(start, start + step)
                codes, micro, stands_for = _nearest_e2m1(groups[piece], outer, nvfp4_shares)
                quantized.codes[rows][piece] = codes.flatten(-2)
                quantized.scales[rows][piece] = micro.view(torch.float8_e4m3fn)
                found[piece] = stands_for.flatten(-2)
            return found


def _nearest_e2m1(groups: Tensor, outer: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (..., G), micro scales (...) as bytes, what they represent (..., G)) of groups, with the one of
    `shares` that is nearest to each in squares."""
    peak = absmax(groups)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = peak
    for share in shares:
        micro = (peak * (share / 6) / outer).clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
        step = (micro.float() * outer).unsqueeze(-1)
        codes = encode_e2m1(groups / step)
        values = decode_e2m1(codes).mul_(step)
        error = torch.linalg.vector_norm(values - groups, dim=-1)
        found = (codes, micro.view(torch.uint8), values)
        if best is None:
            best, least = found, error
            continue
        better = error < least
        wide = better.unsqueeze(-1)
        best = (
            torch.where(wide, codes, best[0]),
            torch.where(better, found[1], best[1]),
            torch.where(wide, values, best[2]),
        )
        least = torch.where(better, error, least)
    assert best is not None
    return best


def outer_scale(weight: Rows, dtype: torch.dtype) -> Tensor:
    """nvfp4's, (1,) in `dtype`, of a weight (N, K)."""
    peak = torch.stack([absmax(weight[rows].flatten()) for rows in row_blocks(weight)]).amax()
    # At least the smallest normal number: below it float16 would lose bits, or the whole layer to an outer scale of 0.
    outer = (peak / 6 / E4M3_MAX).clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
    return torch.where(peak == 0, torch.ones_like(outer), outer).reshape(1)


def int4_extremes(groups: Tensor) -> Tensor:
    """The weight of largest magnitude, with its sign, of groups (..., G), (...)."""
    highest, lowest = groups.amax(-1), groups.amin(-1)
    return torch.where(highest > -lowest, highest, lowest)


def int4_scales(extremes: Tensor, dtype: torch.dtype, *, share: float = INT4_SHARE) -> Tensor:
    """Scales in `dtype` of int4 groups whose weight of largest magnitude is in `extremes`, both (N, K/G) or of any
    other shape: it becomes code -8, or more where `share` is below 1. The scale takes that weight's sign, so that a
    step is 1/8 of it, where codes from -7 to 7 with scales above zero have 1/7. 1 for a group of zeros."""
    scale = (extremes * (share / INT4_LEAST)).to(dtype)
    return scale.masked_fill_(scale == 0, 1)


def fitted_scales(groups: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales (..., 1) float32, exact in `dtype`, with which `codes` (..., G) are nearest to `groups` (..., G) by
    least squares. `scales`, with which they were rounded, stay where that says nothing: of codes that are all 0."""
    product, size = (groups * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
    fitted = (product / size).to(dtype).float()
    return torch.where(torch.isfinite(fitted) & (fitted != 0), fitted, scales)


def absmax(groups: Tensor) -> Tensor:
    """The largest magnitude along the last axis; two reductions are faster than abs() and one. (..., G) -> (...,)."""
    # Of a group of zeros the maximum can be -0, which is another byte in e4m3.
    return torch.maximum(groups.amax(-1), -groups.amin(-1)).abs_()


def _grouped(x: Tensor, group: int) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _reciprocal(scale: Tensor) -> Tensor:
    """1/scale, and 0 for a group that is zero or so small that 1/scale overflows, so that its codes are 0."""
    inverse = 1 / scale
    return torch.where(torch.isinf(inverse), torch.zeros_like(scale), inverse)
