"""Rounding the residual to 4 bits so that the layer's output suffers least: GPTQ with a search of every group's scale.

GPTQ: Frantar et al., arXiv 2210.17323. The Hessian is that of the smoothed and *quantized* activations, which is what
the runtime multiplies with. Columns keep their order, because the file format ties groups to positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.quantizers import (
    E4M3_MAX,
    E4M3_TINY,
    QuantizedWeight,
    decode_e2m1,
    encode_e2m1,
    quantize_weight,
)

# Candidates for a group's scale, as factors of absmax / 7 (int4) or absmax / 6 (nvfp4). Below 1 the largest weights are
# clipped and the others gain resolution.
SCALE_FACTORS = (1.0, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.03)
DAMPING = 0.01  # share of the mean diagonal added to the Hessian, as in GPTQ
BLOCK = 64  # columns between two updates of the rest of the matrix; a multiple of both group sizes


def gptq_weight(
    weight: Tensor, hessian: Tensor, precision: Precision, *, dtype: torch.dtype, parts: tuple[int, ...]
) -> QuantizedWeight:
    """Codes and scales of `weight` (N, K) float32 for inputs with second moments `hessian` (K, K).

    `parts`: the rows of each layer stacked in `weight`; nvfp4 has one outer scale for each, returned as (N,).
    Falls back to rounding to nearest where the Hessian says nothing (no activation at all).
    """
    outer = _outer_scales(weight, precision, dtype, parts)
    inverse = _inverse_cholesky(hessian)
    if inverse is None:
        return nearest_weight(weight, precision, dtype=dtype, parts=parts)
    work = weight.clone()
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.zeros(
        rows, columns // precision.group, dtype=_scale_dtype(precision, dtype), device=weight.device
    )
    for start in range(0, columns, BLOCK):
        end = start + BLOCK
        block, factor = work[:, start:end].clone(), inverse[start:end, start:end]
        errors = torch.zeros_like(block)
        for offset in range(0, BLOCK, precision.group):
            inside = slice(offset, offset + precision.group)
            scale = _search_scale(block[:, inside], factor.diagonal()[inside], precision, outer, dtype)
            scales[:, (start + offset) // precision.group] = scale
            step = scale.float() if outer is None else scale.float() * outer
            for column in range(offset, offset + precision.group):
                code, value = _round(block[:, column], step, precision)
                codes[:, start + column] = code
                error = (block[:, column] - value) / factor[column, column]
                block[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
                errors[:, column] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return QuantizedWeight(codes, scales, None if outer is None else outer.to(dtype))


def _inverse_cholesky(hessian: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Hessian; None where there is nothing to invert."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(torch.isfinite(hessian).all()) or mean <= 0:
        return None
    damped = hessian.double().clone()
    damped.diagonal().add_(float(DAMPING * mean))
    # float64: with fewer rows than channels the matrix is singular but for its damping, and float32 fails on it
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else upper.to(hessian.dtype)


def _search_scale(
    group: Tensor, factor: Tensor, precision: Precision, outer: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The best stored scale (N,) for one group (N, G), by rounding error weighted with 1 / factor^2."""
    peak = group.abs().amax(1)
    importance = (1 / factor.square()).unsqueeze(0)
    best_scale, best_error = None, None
    for share in SCALE_FACTORS:
        scale = _stored_scale(peak * share, precision, outer, dtype)
        step = (scale.float() if outer is None else scale.float() * outer).unsqueeze(1)
        error = ((_round(group, step, precision)[1] - group).square() * importance).sum(1)
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            # float8 has no torch.where on every device; its bytes do
            bytes_of = best_scale.view(torch.uint8 if scale.element_size() == 1 else torch.int16)
            chosen = torch.where(better, scale.view(bytes_of.dtype), bytes_of)
            best_scale = chosen.view(scale.dtype)
            best_error = torch.where(better, error, best_error)
    assert best_scale is not None
    return best_scale


def _stored_scale(peak: Tensor, precision: Precision, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
    match precision:
        case Int4():
            scale = (peak / 7).to(dtype)
            return torch.where(scale == 0, torch.ones_like(scale), scale)
        case NvFp4():
            assert outer is not None
            return (peak / 6 / outer).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def _round(values: Tensor, step: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """(codes int8, the values they stand for)."""
    match precision:
        case Int4():
            codes = torch.round(values / step).clamp(-7, 7)
            return codes.to(torch.int8), codes * step
        case NvFp4():
            codes = encode_e2m1(values / step)
            return codes, decode_e2m1(codes) * step


def _outer_scales(
    weight: Tensor, precision: Precision, dtype: torch.dtype, parts: tuple[int, ...]
) -> Tensor | None:
    """nvfp4's outer scale of every row (N,) float32, exact in `dtype`."""
    if isinstance(precision, Int4):
        return None
    found = [quantize_weight(part, precision, dtype=dtype).outer for part in weight.split(parts)]
    return torch.cat(
        [outer.float().expand(count) for outer, count in zip(found, parts, strict=True) if outer is not None]
    )


def nearest_weight(
    weight: Tensor, precision: Precision, *, dtype: torch.dtype, parts: tuple[int, ...]
) -> QuantizedWeight:
    """Rounding to nearest, in the same form as `gptq_weight`."""
    each = [quantize_weight(part, precision, dtype=dtype) for part in weight.split(parts)]
    outer = None
    if isinstance(precision, NvFp4):
        outer = torch.cat(
            [q.outer.expand(n) for q, n in zip(each, parts, strict=True) if q.outer is not None]
        )
    return QuantizedWeight(torch.cat([q.codes for q in each]), torch.cat([q.scales for q in each]), outer)


def _scale_dtype(precision: Precision, dtype: torch.dtype) -> torch.dtype:
    return torch.float8_e4m3fn if isinstance(precision, NvFp4) else dtype
