"""NF4: 4-bit weights on the quantiles of a normal distribution, in blocks of 64 with one scale each.

W = level(code) * scale. QLoRA, Dettmers et al., arXiv 2305.14314, whose levels these are; scales are stored in 8 bits
themselves ("double quantization"). Unlike there, a scale need not be its block's largest magnitude: like codes, scales
are chosen for the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from svdq_cli.solve.quantizers import Rows, row_blocks
from svdq_cli.solve.rounding import Parameters, best_parameters, gptq
from svdq_cli.solve.second_moments import second_moments

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
GROUP = 64
# Candidates for a scale, as factors of the block's largest magnitude.
SCALE_FACTORS = (1.0, 0.75, 0.80, 0.85, 0.90, 0.95, 1.05)
SCALES_IN_BLOCK = 256  # scales that share one scale of their own
SCALE_OCTAVES = 13  # between the least and the largest of them
_LEAST = 1e-30  # scale of a block of zeros
_PLACES = 4096  # between -1 and 1, whose nearest level is in a table


@dataclass(frozen=True, slots=True)
class Nf4Grid:
    """The grid of one block: its scale is positive, float32."""

    factors: tuple[float, ...] = SCALE_FACTORS
    group: int = GROUP

    def candidates(self, values: Tensor) -> Iterator[Parameters]:
        peak = values.abs().amax(1).clamp(min=_LEAST)
        for factor in self.factors:
            yield (peak * factor,)

    def round(self, values: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
        codes = nearest_codes(values / parameters[0])
        return codes, decode(codes).mul_(parameters[0])

    def error(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Tensor:
        scale = parameters[0].unsqueeze(1)
        exact = values / scale
        lost = about_levels(exact).sub_(exact)
        if importance is not None:
            lost.mul_(importance)
        return torch.linalg.vector_norm(lost, dim=1).mul_(parameters[0])

    def fitted(self, values: Tensor, parameters: Parameters, importance: Tensor | None) -> Parameters:
        levels = about_levels(values / parameters[0].unsqueeze(1))
        weight = levels if importance is None else levels * importance.square()
        product, size = (weight * values).sum(1), (weight * levels).sum(1)
        scale = product / size
        return (torch.where(torch.isfinite(scale) & (scale > 0), scale, parameters[0]),)


def nearest_codes(values: Tensor) -> Tensor:
    """Codes 0 to 15, uint8, of the levels nearest to `values`, which are beyond -1 to 1 where a scale clips. Of any
    shape, which stays."""
    levels = torch.tensor(LEVELS, device=values.device, dtype=torch.float32)
    return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def about_levels(values: Tensor) -> Tensor:
    """The levels nearest to `values`, or next to nearest for a value within 1/4096 of the middle between two: enough to
    compare scales, in a tenth of the time of `nearest_codes`. Of any shape, which stays."""
    places = (values * (_PLACES / 2)).add_(_PLACES / 2).clamp_(0, _PLACES - 1).int()
    return _level_table(values.device).index_select(0, places.flatten()).view(values.shape)


@lru_cache(maxsize=8)
def _level_table(device: torch.device) -> Tensor:
    """(4096,) float32: the level nearest to each of as many places from -1 to 1."""
    middles = (torch.arange(_PLACES, device=device) + 0.5) * (2 / _PLACES) - 1
    return decode(nearest_codes(middles))


def decode(codes: Tensor) -> Tensor:
    """The levels, float32, of codes of any shape, which stays."""
    return torch.tensor(LEVELS, device=codes.device, dtype=torch.float32)[codes.int()]


@dataclass(frozen=True, slots=True, eq=False)
class StoredScales:
    """Scales in 8 bits: scale = levels[code] * size of its block of 256."""

    codes: Tensor  # (B,) uint8, one scale after the other, row by row of the weight
    sizes: Tensor  # (B/256 rounded up,) float32

    @property
    def values(self) -> Tensor:
        """(B,) float32."""
        blocks = self.sizes.repeat_interleave(SCALES_IN_BLOCK)[: len(self.codes)]
        return scale_levels(self.codes.device)[self.codes.int()] * blocks


def scale_levels(device: torch.device | None = None) -> Tensor:
    """The 256 levels of scales, (256,) float32, which a file names itself: each 3.6 % above the one before, from 2^-13
    to 1. The rounding of a scale matters little, since codes are chosen for the scale that it becomes; so one large
    scale may not take the others' resolution, as it would on even levels."""
    exponents = torch.arange(1 - 256, 1, dtype=torch.float64, device=device) * (SCALE_OCTAVES / 255)
    return exponents.exp2().float()


def stored_scales(scales: Tensor) -> StoredScales:
    """`scales` (B,) float32, positive, to the nearest that 8 bits hold."""
    padded = torch.nn.functional.pad(scales, (0, -len(scales) % SCALES_IN_BLOCK))
    blocks = padded.unflatten(0, (-1, SCALES_IN_BLOCK))
    sizes = blocks.amax(1)
    exponents = (blocks / sizes.unsqueeze(1)).log2() * (255 / SCALE_OCTAVES)
    codes = exponents.add_(255).clamp_(0, 255).round_().to(torch.uint8)
    return StoredScales(codes.flatten()[: len(scales)], sizes)


@dataclass(frozen=True, slots=True, eq=False)
class Nf4Solution:
    """A weight in NF4: W = level(code) * scale."""

    codes: Tensor  # (N, K) uint8
    scales: StoredScales  # of N * K/64 blocks

    @property
    def weight(self) -> Tensor:
        """(N, K) float32."""
        return self.rows(slice(None), self.scales.values.view(len(self.codes), -1))

    def rows(self, part: slice, scales: Tensor) -> Tensor:
        """Some rows of the weight, (n, K) float32. `scales`: those of all, (N, K/64)."""
        return (decode(self.codes[part]).unflatten(1, (-1, GROUP)) * scales[part].unsqueeze(2)).flatten(1)


def solve_for_rows(weights: Sequence[Tensor], rows: Tensor, *, moments_fit: bool = True) -> list[Nf4Solution]:
    """Layers that read one input, `weights` (N, K) float32 each, for inputs `rows` (M, K) float32.

    Scales are chosen for the size of each channel, then codes by GPTQ (see `rounding`); without the memory for second
    moments (`moments_fit` False), codes are the nearest.
    """
    if not moments_fit:
        importance = rows.square().mean(0).sqrt()
        return [nearest(weight, importance) for weight in weights]
    moments = second_moments(rows)
    importance = moments.diagonal().sqrt()
    scales = [_stored(weight, importance) for weight in weights]
    chosen = torch.cat([each.values.view(len(w), -1) for each, w in zip(scales, weights, strict=True)])
    # codes of a row do not depend on other rows: layers that read one input are solved at once
    rounded = gptq(torch.cat(list(weights)), moments, Nf4Grid(), parameters=(chosen,))
    if rounded is None:
        return [nearest(weight) for weight in weights]
    codes = rounded.codes.split([len(weight) for weight in weights])
    return [Nf4Solution(each.contiguous(), stored) for each, stored in zip(codes, scales, strict=True)]


def nearest(weight: Rows, importance: Tensor | None = None, *, plain: bool = False) -> Nf4Solution:
    """Every weight to its nearest level. The scale of a block is the candidate that loses least or, `plain`, its
    largest magnitude. `weight` (N, K) is asked for its rows twice; `importance` (K,)."""
    stored = _stored(weight, importance, plain=plain)
    scales = stored.values.view(len(weight), -1)
    codes = torch.empty(*weight.shape, dtype=torch.uint8, device=weight.device)
    for part in row_blocks(weight):
        blocks = weight[part].unflatten(1, (-1, GROUP))
        codes[part] = nearest_codes(blocks / scales[part].unsqueeze(2)).flatten(1)
    return Nf4Solution(codes, stored)


def _stored(weight: Rows, importance: Tensor | None, *, plain: bool = False) -> StoredScales:
    found: list[Tensor] = []
    grid = Nf4Grid((1.0,)) if plain else Nf4Grid()
    for part in row_blocks(weight):
        rows = weight[part]
        blocks = rows.reshape(-1, GROUP)
        own = None
        if importance is not None:
            own = importance.view(1, -1, GROUP).expand(len(rows), -1, -1).reshape(-1, GROUP)
        found.append(next(grid.candidates(blocks))[0] if plain else best_parameters(blocks, own, grid)[0])
    return stored_scales(torch.cat(found))
