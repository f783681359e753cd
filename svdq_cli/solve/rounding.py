"""Rounding a weight to 4 bits so that the layer's output suffers least: GPTQ with a search of every group's scale.

GPTQ: Frantar et al., arXiv 2210.17323. The Hessian is that of what the runtime multiplies with: smoothed and
*quantized* activations for W4A4, the activations as they are for W4A16. Columns keep their order, because the file
formats tie groups to positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.solve.quantizers import (
    E4M3_MAX,
    E4M3_TINY,
    INT4_LEAST,
    INT4_MOST,
    QuantizedWeight,
    absmax,
    decode_e2m1,
    encode_e2m1,
    int4_extremes,
    int4_scales,
    outer_scale,
    row_blocks,
)
from svdq_cli.system.threads import end_if_left

# Candidates for a group's scale, as factors of the one that just reaches its extreme. Below 1 the largest weights are
# clipped and the others gain resolution.
SCALE_FACTORS = (1.0, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.03)
# E2M1 is finer below 4: a scale with which the largest weight becomes that, or what is between, may lose less.
NVFP4_FACTORS = (*SCALE_FACTORS, 1.2, 1.35, 1.5)
NO_SEARCH = (1.0,)
DAMPING = 0.01  # share of the mean diagonal added to the Hessian, as in GPTQ
MIDDLE = 8  # the code of W4A16 weights that some runtimes count from
BLOCK = 64  # columns between two updates of the rest of the matrix; a multiple of every group size

Parameters = tuple[Tensor, ...]  # what is stored for one group, (N,) each, in its stored dtype


class Grid(Protocol):
    """The values that a group of weights can take."""

    @property
    def group(self) -> int: ...

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        """Parameters worth trying for groups `values` (N, G), the safest first."""
        ...

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """(codes, what they represent) for `values` (N, ...) float32. Codes are uint8 or int8."""
        ...

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        """How far rounding moves each group of `values` (N, G): the norm (N,) of the differences, each times its
        importance, (1, G) or (N, G), where there is one. Without the rounding of what codes represent to 16 bits."""
        ...

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Parameters | None:
        """The parameters with which the codes that `parameters` give are nearest to groups `values`; None for a grid
        that takes the candidates as they are. `values` is (N, G), `importance` (1, G)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    codes: Tensor  # (N, K)
    parameters: Parameters  # (N, K/G) each

    def of_height(self, rows: int) -> Rounded:
        """An empty matrix of this many rows, otherwise alike."""
        return Rounded(
            self.codes.new_empty(rows, self.codes.shape[1]),
            tuple(each.new_empty(rows, each.shape[1]) for each in self.parameters),
        )


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = DAMPING,
    parameters: Parameters | None = None,
) -> Rounded | None:
    """`weight` (N, K) float32 on `grid` for inputs with second moments `hessian` (K, K). `parameters`, (N, K/G) each:
    those of every group, where they are chosen already.

    None where the Hessian says nothing (no activation at all, or one that is not finite).
    """
    inverse = _inverse_cholesky(hessian, damping)
    if inverse is None:
        return None
    work = weight.T.contiguous()  # (K, N): one column of the weight after the other, each in one piece
    codes: list[Tensor] = []
    chosen: list[Parameters] = []
    for start in range(0, len(work), BLOCK):
        end_if_left()
        end = start + BLOCK
        block, factor = work[start:end], inverse[start:end, start:end]
        errors = torch.zeros_like(block)
        for offset in range(0, BLOCK, grid.group):
            inside = slice(offset, offset + grid.group)
            if parameters is None:
                importance = (1 / factor.diagonal()[inside]).unsqueeze(0)
                own = best_parameters(block[inside].T, importance, grid)
            else:
                own = tuple(each[:, (start + offset) // grid.group] for each in parameters)
            chosen.append(own)
            for column in range(offset, offset + grid.group):
                code, value = grid.round(block[column], own)
                codes.append(code)
                errors[column] = (block[column] - value) / factor[column, column]
                block[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
        work[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return Rounded(torch.stack(codes, 1), tuple(_stack(each) for each in zip(*chosen, strict=True)))


def nearest(weight: Tensor, grid: Grid) -> Rounded:
    """Every value rounded on its own; each group's parameters are the candidates' best. `weight` is (N, K)."""
    # What stays is put where it belongs at once: kept among the blocks' temporary tensors, it would leave gaps as large
    # as those, which add up to more than the codes.
    whole: Rounded | None = None
    for rows in row_blocks(weight):
        part = _nearest(weight[rows], grid)
        whole = whole or part.of_height(len(weight))
        whole.codes[rows] = part.codes
        for kept, chosen in zip(whole.parameters, part.parameters, strict=True):
            kept[rows] = chosen
    assert whole is not None
    return whole


def _nearest(weight: Tensor, grid: Grid) -> Rounded:
    rows, columns = weight.shape
    groups = weight.reshape(-1, grid.group)  # every group is a row of its own
    parameters = best_parameters(groups, None, grid)
    codes, _ = grid.round(groups, tuple(parameter.unsqueeze(1) for parameter in parameters))
    return Rounded(codes.reshape(rows, columns), tuple(each.reshape(rows, -1) for each in parameters))


def _inverse_cholesky(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Hessian; None where there is nothing to invert."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(torch.isfinite(hessian).all()) or mean <= 0:
        return None
    # float64: with fewer rows than channels the matrix is singular but for its damping, and float32 fails on it.
    # One name for all stages, so that no more than two of these large matrices are alive at a time.
    matrix = hessian.double()
    matrix.diagonal().add_(float(damping * mean))
    matrix, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    matrix = torch.cholesky_inverse(matrix)
    matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    return None if int(failed) else matrix.to(hessian.dtype)


def best_parameters(values: Tensor, importance: Tensor | None, grid: Grid) -> Parameters:
    """Each row's best of the candidates for one group (N, G), by rounding error, times its `importance` (1, G) or
    (N, G) where there is one."""
    candidates = list(grid.candidates(values))
    errors = torch.stack([grid.error(values, parameters, importance) for parameters in candidates])
    least = errors.min(0, keepdim=True)  # the first of equals; three times as fast as argmin
    best = tuple(_picked(each, least.indices) for each in zip(*candidates, strict=True))
    fitted = grid.fitted(values, best, importance)
    if fitted is None:
        return best
    better = grid.error(values, fitted, importance) < least.values.squeeze(0)
    return tuple(torch.where(better, new, old) for new, old in zip(fitted, best, strict=True))


def _norm(differences: Tensor, importance: Tensor | None) -> Tensor:
    """(N, G) -> (N,), in the memory of `differences`."""
    return torch.linalg.vector_norm(
        differences if importance is None else differences.mul_(importance), dim=1
    )


def _picked(choices: tuple[Tensor, ...], index: Tensor) -> Tensor:
    """The choice of each row, (N,), that `index` (1, N) selects."""
    dtype = choices[0].dtype
    return torch.stack(_as_known(choices)).gather(0, index).squeeze(0).view(dtype)


def _stack(columns: tuple[Tensor, ...]) -> Tensor:
    """torch.stack along dim 1 that also takes float8."""
    return torch.stack(_as_known(columns), 1).view(columns[0].dtype)


def _as_known(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """float8 as its bytes: torch neither stacks nor gathers it everywhere."""
    return tensors if tensors[0].element_size() > 1 else tuple(each.view(torch.uint8) for each in tensors)


# ---------------------------------------------------------------------------------------------------- the grids


@dataclass(frozen=True, slots=True)
class Int4Grid:
    """codes * scale, codes -8 to 7; the scale has the sign with which the largest weight is negative."""

    dtype: torch.dtype
    factors: tuple[float, ...] = SCALE_FACTORS
    group: int = Int4.group

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        whole = int4_extremes(values)
        for share in self.factors:
            yield (int4_scales(whole, self.dtype, share=share),)

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        codes = (values / parameters[0].float()).round_().clamp_(INT4_LEAST, INT4_MOST)
        return codes.to(torch.int8), codes.mul_(parameters[0].float())

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        scale = parameters[0].float()
        exact = values / scale.unsqueeze(1)
        lost = exact.round().clamp_(INT4_LEAST, INT4_MOST).sub_(exact)
        return _norm(lost, importance).mul_(scale.abs())

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> None:
        return None


@dataclass(frozen=True, slots=True, eq=False)
class NvFp4Grid:
    """e2m1 * e4m3 micro scale * outer scale."""

    outer: Tensor  # (N,) float32
    factors: tuple[float, ...] = SCALE_FACTORS
    group: int = NvFp4.group

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        peak = absmax(values)
        for share in self.factors:
            yield ((peak * share / 6 / self.outer).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn),)

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        step = self._step(parameters)
        codes = encode_e2m1(values / step)
        return codes, decode_e2m1(codes).mul_(step)

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        step = self._step(parameters)
        exact = values / step.unsqueeze(1)
        return _norm(decode_e2m1(encode_e2m1(exact)).sub_(exact), importance).mul_(step)

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> None:
        return None

    def _step(self, parameters: Parameters) -> Tensor:
        scale = parameters[0].float()
        return scale * (self.outer if scale.ndim == 1 else self.outer.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """W4A16: codes * scale + zero, codes 0 to 15, both numbers 16-bit and the sum rounded to 16 bits by the kernels.

    Tries the symmetric grid of 15 levels that exporters usually write, and all 16 levels from minimum to maximum, with
    ranges that are now and then the best (the others of SCALE_FACTORS are for 1 group in 1,000 of a trained model's
    modulations, or none). Then scale and zero are fitted to the codes of the best by least squares, which takes 1.4 %
    off the error that 16 candidates leave.

    Runtimes count codes from 0 or from the middle, 8. So that one solution serves both, zero + 8 * scale is exact in
    16 bits; where it would not be (a group far from 0 for its width), the grid is the one around 0.
    """

    dtype: torch.dtype
    group: int = 64

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        low, high = values.amin(1), values.amax(1)
        peak = torch.maximum(high, -low)
        for share in (1.0, 0.85):
            yield self._parameters(peak * (share / 7), None)
        middle, half = (high + low) / 2, (high - low) / 2
        for share in (1.0, 0.95, 0.90):
            yield self._parameters(half * (share * 2 / 15), torch.sub(middle, half, alpha=share))

    def _parameters(self, scale: Tensor, zero: Tensor | None) -> Parameters:
        scale = scale.to(self.dtype)
        if (
            zero is not None
        ):  # of a group of one number, which the zero is: 8 codes further up must be exact as well
            scale = torch.where(scale == 0, zero.abs().to(self.dtype) / MIDDLE, scale)
        scale.masked_fill_(scale == 0, 1)
        return scale, _middled(scale, (-7 * scale if zero is None else zero).to(self.dtype))

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        scale, zero = (parameter.float() for parameter in parameters)
        codes = (values - zero).div_(scale).round_().clamp_(0, 15)
        return codes.to(torch.uint8), codes.mul_(scale).add_(zero).to(self.dtype).float()

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        # before the sum is rounded to 16 bits, which adds about the same to every candidate's
        scale, zero = (parameter.float().unsqueeze(1) for parameter in parameters)
        exact = (values - zero).div_(scale)
        return _norm(exact.round().clamp_(0, 15).sub_(exact), importance).mul_(scale.squeeze(1))

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Parameters:
        scale, zero = (parameter.float().unsqueeze(1) for parameter in parameters)
        codes = (values - zero).div_(scale).round_().clamp_(0, 15)
        weight = values.new_ones(self.group, 1) if importance is None else importance.square().T
        count, code_sum, value_sum = weight.sum(), codes @ weight, values @ weight
        product_sum = (codes * values) @ weight
        spread = (codes.square_() @ weight).mul_(count).sub_(code_sum.square())
        slope = (product_sum * count).sub_(code_sum * value_sum).div_(spread)
        # Codes that are all one tell nothing about the scale, and a slope of 0 or less is not a scale.
        slope = torch.where((spread > 0) & (slope > 0), slope, scale).to(self.dtype)
        slope = torch.where(slope > 0, slope, parameters[0].unsqueeze(1))  # not where it vanishes in 16 bits
        zero = ((value_sum - code_sum * slope.float()) / count).to(self.dtype)
        return slope.squeeze(1), _middled(slope, zero).squeeze(1)


def _middled(scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest zero from which code 8 represents a 16-bit number; -8 * scale where there is none near. 16-bit."""
    eight = MIDDLE * scale.float()
    exact = (zero.float() + eight).to(scale.dtype).float() - eight
    rounded = exact.to(scale.dtype)
    return torch.where(rounded.float() == exact, rounded, (-eight).to(scale.dtype))


# ---------------------------------------------------------------------------------------------------- W4A4 weights


def gptq_weight(
    weight: Tensor,
    hessian: Tensor,
    precision: Precision,
    *,
    dtype: torch.dtype,
    parts: tuple[int, ...],
    factors: tuple[float, ...] = SCALE_FACTORS,
) -> QuantizedWeight | None:
    """Codes and scales of a W4A4 residual `weight` (N, K) float32; None where the Hessian says nothing.

    `parts`: the rows of `weight` that have an nvfp4 outer scale of their own, usually each layer's; returned as (N,).
    `factors`: the scales to choose from for a group, as shares of the one that reaches its peak; NO_SEARCH is GPTQ as
    published.
    """
    match precision:
        case Int4():
            found, outer = gptq(weight, hessian, Int4Grid(dtype, factors)), None
        case NvFp4():
            outers = [outer_scale(part, dtype).expand(len(part)) for part in weight.split(parts)]
            outer = torch.cat(outers)
            wide = NVFP4_FACTORS if factors == SCALE_FACTORS else factors
            found = gptq(weight, hessian, NvFp4Grid(outer.float(), wide))
    return None if found is None else QuantizedWeight(found.codes, found.parameters[0], outer)
