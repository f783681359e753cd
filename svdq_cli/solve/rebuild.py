"""From a solution back to a weight, and how far that is from the original: what the self-check rests on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.records import LayerSolution, RotatedSolution, W4A4Solution, W4A16Solution
from svdq_cli.solve.modulation import dequantize_w4a16
from svdq_cli.solve.quantizers import QuantizedWeight, Rows, dequantize_weight, row_blocks
from svdq_cli.solve.rotation import rotate, rotated_weight


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far a rebuilt weight is from the original.

    W4A4 layers are compared in smoothed coordinates (columns multiplied by the smoothing factor), where rounding is
    uniform. The search moves a weight on purpose (GPTQ, block reconstruction), so a distance alone tells little; but it
    never turns one away from the original, as a wrong permutation, a smoothing factor used upside down or a foreign
    weight do.
    """

    relative: float  # Frobenius norm of the error over that of the weight
    # Cosine between the 4-bit part and what it represents: the weight less its low-rank branch.
    agreement: float
    strayed_rows: float  # share of output rows whose own cosine is that of unrelated numbers
    # How the columns' gains follow the smoothing factor: 0 as they should, -2 where it is inverted.
    smooth_slope: float


def rebuilt_weight(solution: LayerSolution) -> Tensor:
    """The 16-bit weight that a solution represents, (N, K) float32, in the coordinates of the raw activation."""
    match solution:
        case W4A4Solution():
            quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
            four_bit = dequantize_weight(quantized, solution.plan.precision) / solution.smooth.float()
            return four_bit + solution.up.float() @ solution.down.float()
        case W4A16Solution():
            return dequantize_w4a16(solution)
        case RotatedSolution():
            return rotate(rotated_weight(solution), solution.plan.rotation)


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What a low-rank branch leaves of a weight, in smoothed coordinates: (weight - up down) * smooth. Its rows are
    computed when they are asked for, so that no second matrix of this size is in memory."""

    weight: Tensor  # (N, K)
    up: Tensor  # (N, R)
    down: Tensor  # (R, K)
    smooth: Tensor | None  # (K,); None for a factor of 1

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, rows: slice) -> Tensor:
        left = torch.addmm(self.weight[rows], self.up[rows], self.down, alpha=-1)
        return left if self.smooth is None else left.mul_(self.smooth)


def relative_error(solution: LayerSolution, weight: Tensor) -> float:
    """The relative error of a solution's weight (the first value of `weight_error`). `weight` is (N, K)."""
    smooth = _smooth_of(solution)
    error = exact = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rows in row_blocks(weight):
        lost, there = _energies(rows_of(solution, rows), weight[rows].float(), smooth)
        error, exact = error + lost, exact + there
    return _relative(error, exact)


def weight_error(solution: LayerSolution, weight: Rows) -> WeightError:
    """`weight` (N, K): the 16-bit layer's. Some rows at a time, so that memory does not grow with the layer."""
    smooth = _smooth_of(solution)
    sums = _Sums(weight.shape[1], weight.device, by_column=smooth is not None)
    for rows in row_blocks(weight):
        sums.add(*_compared(rows_of(solution, rows), weight[rows].float(), smooth))
    slope = 0.0 if smooth is None else _smooth_slope(sums.gain(), smooth)
    return WeightError(
        relative=_relative(sums.error, sums.exact),
        agreement=1.0 if sums.empty_rows == len(weight) else float(sums.cosine()),
        strayed_rows=float(sums.strayed_rows) / len(weight),
        smooth_slope=slope,
    )


def is_curve(solution: LayerSolution) -> bool:
    """Whether a layer is its low-rank branch alone (`solve_curve`). Files do not say so: all codes are zero."""
    return isinstance(solution, W4A4Solution) and not bool(solution.codes.any())


def curve_error(solution: W4A4Solution, weight: Rows) -> float:
    """How far a curve's `down` is from what `up` makes of the 16-bit layer's `weight` (N, K): their relative distance
    (Frobenius), 0 for the exact projection. The weight itself is not to be rebuilt: most of it meets no input."""
    up = solution.up.double()
    projected = torch.zeros(up.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_blocks(weight):
        projected += up[rows].T @ weight[rows].double()
    wanted = torch.linalg.lstsq(up.T @ up, projected, driver="gelsd").solution
    return float((solution.down.double() - wanted).norm() / wanted.norm().clamp(min=1e-60))


def _smooth_of(solution: LayerSolution) -> Tensor | None:
    """The smoothing factor, or None if it is 1, as in data-free conversions: there is nothing to multiply by, and no
    slope."""
    if not isinstance(solution, W4A4Solution):
        return None
    smooth = solution.smooth.float()
    return None if bool((smooth == 1).all()) else smooth


def _relative(error: Tensor, exact: Tensor) -> float:
    return float((error / exact.clamp(min=1e-60)).sqrt())


def rows_of(solution: LayerSolution, rows: slice) -> LayerSolution:
    """The layer with only these of its output rows; its plan is unchanged."""
    match solution:
        case W4A4Solution(outer=outer):
            return replace(
                solution,
                up=solution.up[rows],
                codes=solution.codes[rows],
                scales=solution.scales[rows],
                outer=outer if outer is None or outer.numel() == 1 else outer[rows],
                bias=None if solution.bias is None else solution.bias[rows],
            )
        case W4A16Solution():
            return replace(
                solution,
                codes=solution.codes[rows],
                scales=solution.scales[rows],
                zeros=solution.zeros[rows],
                bias=None if solution.bias is None else solution.bias[rows],
            )
        case RotatedSolution(row_scales=row_scales):
            return replace(
                solution,
                codes=solution.codes[rows],
                scales=solution.scales[rows],
                row_scales=None if row_scales is None else row_scales[rows],
                bias=None if solution.bias is None else solution.bias[rows],
            )


def _compared(
    solution: LayerSolution, weight: Tensor, smooth: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(the 4-bit part, what it represents, the whole weight), (N, K) float32 each, in smoothed coordinates. `smooth`
    None for a factor of 1."""
    match solution:
        case W4A4Solution():
            quantized = QuantizedWeight(solution.codes, solution.scales, solution.outer)
            left = Residual(weight, solution.up.float(), solution.down.float(), smooth)[:]
            whole = weight if smooth is None else weight * smooth
            return dequantize_weight(quantized, solution.plan.precision), left, whole
        case W4A16Solution():
            return dequantize_w4a16(solution), weight, weight
        case RotatedSolution():
            return rebuilt_weight(solution), weight, weight


def _energies(solution: LayerSolution, weight: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """(of the error, of the whole weight), sums of squares."""
    four_bit, stands_for, whole = _compared(solution, weight, smooth)
    return _square_sum(_row_norms(four_bit.sub_(stands_for))), _square_sum(_row_norms(whole))


class _Sums:
    """What `weight_error` needs of all rows: sums along a row in float32, over rows in float64."""

    def __init__(self, columns: int, device: torch.device, *, by_column: bool) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.error, self.exact, self.product, self.four_bit, self.stands_for = (zeros() for _ in range(5))
        self.columns = (zeros(columns), zeros(columns)) if by_column else None
        self.strayed_rows = self.empty_rows = 0
        self._unrelated = 3 / columns**0.5  # three standard deviations of the cosine of random vectors

    def add(self, four_bit: Tensor, stands_for: Tensor, exact: Tensor) -> None:
        products = four_bit * stands_for
        by_row = products.sum(1)
        four_bit_size, size = _row_norms(four_bit), _row_norms(stands_for)
        self.product += by_row.double().sum()
        self.four_bit += _square_sum(four_bit_size)
        self.stands_for += _square_sum(size)
        self.exact += _square_sum(size if exact is stands_for else _row_norms(exact))
        self.error += _square_sum(_row_norms(four_bit - stands_for))
        if self.columns is not None:
            self.columns[0].add_(products.sum(0))
            self.columns[1].add_(stands_for.square().sum(0))
        empty = (four_bit_size == 0) | (size == 0)
        strayed = by_row < self._unrelated * four_bit_size * size
        self.strayed_rows += int((strayed & ~empty).sum())
        self.empty_rows += int(empty.sum())

    def gain(self) -> Tensor:
        """(K,): the regression of each column on what it represents."""
        assert self.columns is not None
        products, sizes = self.columns
        return products / sizes.clamp(min=1e-30)

    def cosine(self) -> Tensor:
        return self.product / (self.four_bit.sqrt() * self.stands_for.sqrt())


def _row_norms(matrix: Tensor) -> Tensor:
    """The Euclidean norm of every row, (N,)."""
    return torch.linalg.vector_norm(matrix, dim=1)


def _square_sum(norms: Tensor) -> Tensor:
    return norms.double().square().sum()


def _smooth_slope(gain: Tensor, smooth: Tensor) -> float:
    """Slope of log gain against log smooth over input channels. A file whose smoothing factor is s' where its codes
    were made with s has gains s / s'."""
    known = gain > 0.01  # dead channels say nothing
    if int(known.sum()) < 2:
        return 0.0
    x, y = smooth[known].double().log(), gain[known].double().log()
    x = x - x.mean()
    spread = float(x.square().mean())
    # a spread below 3 % is that of a factor which is 1 but for rounding, and can be turned around without harm
    return 0.0 if spread < 1e-3 else float((x * y).mean()) / spread


def bias_error(solution: LayerSolution, bias: Tensor | None) -> float:
    """Relative error of the stored bias, 0 for a layer without one. `bias` is (N,)."""
    if solution.bias is None or bias is None:
        return 0.0 if solution.bias is None and bias is None else 1.0
    return float((solution.bias.float() - bias.float()).norm() / bias.float().norm().clamp(min=1e-30))
