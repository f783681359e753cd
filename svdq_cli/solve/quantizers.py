"""The 4-bit number formats, as the runtimes define them: weights (what a checkpoint stores) and activations (what the
kernels do on the fly).

Sources: SVDQuant (arXiv 2411.05007); number formats as read by Nunchaku and diffusers' `nunchaku_lite`:
int4 is symmetric with one 16-bit scale per 64 inputs; nvfp4 is E2M1 with one e4m3 micro scale per 16 inputs and a
16-bit outer scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitude of codes 0..7; codes 8..15 are the negatives
BLOCK = 1 << 20  # numbers that are worked on at a time
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # the smallest positive e4m3 number; a micro scale of zero would divide zero by zero

# Thresholds between neighboring E2M1 magnitudes.
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """W = codes * scales * outer. All in stored dtypes."""

    codes: Tensor  # (N, K) int8: int4 in [-7, 7], nvfp4 nibbles 0..15
    scales: Tensor  # (N, K/G)
    outer: Tensor | None  # nvfp4: (1,) or (N,)


def quantize_weight(weight: Tensor, precision: Precision, *, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest with absmax scales. `weight` (N, K) float32, `dtype` the stored 16-bit dtype."""
    match precision:
        case Int4():
            return _int4_weight(weight, dtype)
        case NvFp4():
            return _nvfp4_weight(weight, dtype)


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
    """Quantize and dequantize, (N, K) float32, for scoring: as `quantize_weight` but for ties of e2m1, which round to
    even here (a few weights in a million differ)."""
    groups = _grouped(weight, precision.group)
    peak = groups.abs().amax(-1, keepdim=True)
    match precision:
        case Int4():
            scale = (peak / 7).to(dtype).float().clamp(min=1e-30)
            rounded = torch.round(groups / scale).clamp_(-7, 7)
        case NvFp4():
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
    peak = groups.abs().amax(-1, keepdim=True)
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
    """Nibbles 0..15 -> float32 values."""
    table = torch.tensor(E2M1 + tuple(-m for m in E2M1), dtype=torch.float32, device=codes.device)
    return table[codes.long()]


def encode_e2m1(values: Tensor) -> Tensor:
    """Nearest E2M1 nibble; ties go to the smaller magnitude and zero is always code 0 (as checkpoints store it)."""
    midpoints = torch.tensor(_E2M1_MIDPOINTS, dtype=values.dtype, device=values.device)
    magnitude = torch.bucketize(
        values.abs().contiguous(), midpoints
    )  # right=False: a value on a midpoint stays below it
    negative = (values < 0) & (magnitude > 0)
    return (magnitude + 8 * negative).to(torch.int8)


def round_e2m1_to_even(values: Tensor) -> Tensor:
    """E2M1 values by round-to-nearest-even, saturating: what the GPU's conversion does to activations."""
    magnitude = values.abs()
    # The step between neighbors is 0.5 below 2, 1 below 4, then 2; dividing by it makes torch.round the exact rule.
    step = 0.5 * (1.0 + (magnitude >= 2) + 2.0 * (magnitude >= 4))
    return torch.copysign((torch.round(magnitude / step) * step).clamp_(max=6.0), values)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows, of about BLOCK numbers each: what is done block by block stays in the cache, and
    takes little memory beside the matrix."""
    step = max(1, BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step)


def _int4_weight(weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    parts = [_int4_rows(weight[rows], dtype) for rows in row_blocks(weight)]
    return QuantizedWeight(
        torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]), None
    )


def _int4_rows(weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    groups = _grouped(weight, Int4.group)
    scales = (groups.abs().amax(-1) / 7).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = torch.round(groups / scales.float().unsqueeze(-1)).clamp(-7, 7)
    return QuantizedWeight(codes.reshape(weight.shape).to(torch.int8), scales, None)


def _nvfp4_weight(weight: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    groups = _grouped(weight, NvFp4.group)
    wanted = groups.abs().amax(-1) / 6
    # At least the smallest normal number: below it float16 would lose bits, or the whole layer to an outer scale of 0.
    outer = (wanted.max() / E4M3_MAX).clamp(min=torch.finfo(dtype).smallest_normal).to(dtype)
    outer = torch.where(wanted.max() == 0, torch.ones_like(outer), outer)
    micro = (wanted / outer.float()).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    values = groups / (micro.float() * outer.float()).unsqueeze(-1)
    return QuantizedWeight(encode_e2m1(values).reshape(weight.shape), micro, outer.reshape(1))


def _grouped(x: Tensor, group: int) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _reciprocal(scale: Tensor) -> Tensor:
    """1/scale, and 0 for a group that is zero or so small that 1/scale overflows, so that its codes are 0."""
    inverse = 1 / scale
    return torch.where(torch.isinf(inverse), torch.zeros_like(scale), inverse)
