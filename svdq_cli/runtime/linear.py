"""A converted linear in plain torch: the arithmetic of the 4-bit runtimes, as functions and as modules.

One float32 GEMM computes the 4-bit product; no loop over groups is needed. Why: a dequantized operand is a
4-bit code times a scale. With bfloat16 scales that is at most 3 + 8 significant bits (int4) or 2 + 4 (nvfp4,
whose outer scale multiplies the sum), so operands and their pairwise products (22 bits) are exact in float32.
With float16 scales the operands (14 bits) are exact and int4 products are rounded in their last bits. What is
left is the order in which float32 sums.

Every layer has two values:
* `*_exact`, float32, rounded nowhere but at the inputs: the contract value, on which errors are measured.
* `*_forward`, rounded to 16 bits where every runtime rounds (the branch's hidden vector, the result): what the
  modules return.
The CUDA kernels also keep their running int4 sum in 16 bits. That is noise, not contract, and not imitated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.records import GELU_SHIFT, LayerSolution, RotatedSolution, W4A4Solution, W4A16Solution
from svdq_cli.solve.forward import sixteen_bit_of
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight, fake_quantize_activation
from svdq_cli.solve.rotation import fake_quantize_rows, rotate, rotated_weight

# A float32 copy of the weight is kept per layer up to this size (1024 x 1024). Larger layers dequantize at
# every call, so that a large model does not grow to 8 times its file in memory.
CACHE_BYTES = 4 * 2**20
NO_ROTATION = "no kernel of svdq rotates its input"  # why other backends leave such a layer to this module

# ------------------------------------------------------------------------------------------ W4A4


def w4a4_weight(solution: W4A4Solution) -> Tensor:
    """codes * scales, (N, K) float32, exact. Without nvfp4's outer scale, which multiplies the product."""
    precision = solution.plan.precision
    one = torch.ones(1, device=solution.codes.device, dtype=torch.float32)
    return dequantize_weight(QuantizedWeight(solution.codes, solution.scales, one), precision)


@torch.no_grad()
def w4a4_exact(x: Tensor, solution: W4A4Solution, *, unsigned_from: int | None = None) -> Tensor:
    """The layer's contract value: no 16-bit rounding but that of x. `x` (..., K) -> (..., N) float32."""
    rows = _sixteen_bit_rows(x, solution.up.dtype)
    y = _four_bit_product(rows, solution, w4a4_weight(solution), unsigned_from)
    hidden = _matmul(rows.float(), solution.down)
    return _shaped_as(x, _with_bias(y + _matmul(hidden, solution.up), solution.bias))


@torch.no_grad()
def w4a4_forward(
    x: Tensor, solution: W4A4Solution, *, weight: Tensor | None = None, unsigned_from: int | None = None
) -> Tensor:
    """The layer as the runtimes run it: rounded to the checkpoint's dtype. `x` (..., K) -> (..., N) in x's dtype.

    `weight`: w4a4_weight(solution), where the caller keeps it. `unsigned_from`: the first of the channels, if any, that
    a plain GELU feeds and the checkpoint's runtime therefore quantizes without a sign.
    """
    dtype = solution.up.dtype
    rows = _sixteen_bit_rows(x, dtype)
    weight = w4a4_weight(solution) if weight is None else weight
    y = _four_bit_product(rows, solution, weight, unsigned_from)
    if solution.up.shape[1] > 0:
        hidden = _matmul(rows.float(), solution.down).to(dtype)
        y = y + _matmul(hidden.float(), solution.up)
    return _shaped_as(x, _with_bias(y, solution.bias)).to(dtype).to(x.dtype)


def _four_bit_product(
    rows: Tensor, solution: W4A4Solution, weight: Tensor, unsigned_from: int | None
) -> Tensor:
    """qa(rows / smooth) . weight^T * outer, (M, N) float32. int4 keeps its scales in the dtype of `rows`."""
    precision = solution.plan.precision
    if unsigned_from is None:
        y = _matmul(fake_quantize_activation(rows / solution.smooth, precision), weight)
        return y if solution.outer is None else y * solution.outer.float()
    start = unsigned_from
    shifted = fake_quantize_activation(
        (rows[:, start:] + GELU_SHIFT) / solution.smooth[start:], precision, unsigned=True
    )
    y = _matmul(shifted, weight[:, start:]) - shift_in_product(weight[:, start:], solution.smooth[start:])
    if start == 0:
        return y
    signed = fake_quantize_activation(rows[:, :start] / solution.smooth[:start], precision)
    return y + _matmul(signed, weight[:, :start])


def shift_in_product(weight: Tensor, smooth: Tensor) -> Tensor:
    """What adding GELU_SHIFT to the activation adds to the product, (N,) float32. A file holds it in the bias, rounded
    to 16 bits once. `weight` (N, K)."""
    return (weight / smooth.float()).sum(1) * GELU_SHIFT


# ------------------------------------------------------------------------------------------ W4A16


def w4a16_weight(solution: W4A16Solution) -> Tensor:
    """codes * scales + zeros, (N, K) float32."""
    groups = solution.codes.float().unflatten(-1, (-1, solution.plan.group))
    scales, zeros = solution.scales.float().unsqueeze(-1), solution.zeros.float().unsqueeze(-1)
    return (groups * scales + zeros).flatten(-2)


def w4a16_rounded_weight(solution: W4A16Solution) -> Tensor:
    """What the kernel multiplies with: it makes each weight by one 16-bit fma, one rounding of the sum. (N, K)."""
    return w4a16_weight(solution).to(solution.scales.dtype).float()


@torch.no_grad()
def w4a16_exact(x: Tensor, solution: W4A16Solution) -> Tensor:
    """The layer's contract value: no 16-bit rounding but that of x. `x` (..., K) -> (..., N) float32."""
    rows = _sixteen_bit_rows(x, solution.scales.dtype).float()
    return _shaped_as(x, _with_bias(_matmul(rows, w4a16_weight(solution)), solution.bias))


@torch.no_grad()
def w4a16_forward(x: Tensor, solution: W4A16Solution, *, weight: Tensor | None = None) -> Tensor:
    """The layer as the runtimes run it: rounded to the checkpoint's dtype. `x` (..., K) -> (..., N) in x's dtype.

    `weight`: w4a16_rounded_weight(solution), where the caller keeps it.
    """
    dtype = solution.scales.dtype
    rows = _sixteen_bit_rows(x, dtype).float()
    weight = w4a16_rounded_weight(solution) if weight is None else weight
    return _shaped_as(x, _with_bias(_matmul(rows, weight), solution.bias)).to(dtype).to(x.dtype)


# ------------------------------------------------------------------------------------------ rotated


@torch.no_grad()
def rotated_exact(x: Tensor, solution: RotatedSolution, *, weight: Tensor | None = None) -> Tensor:
    """The layer's contract value: no 16-bit rounding but that of x. `x` (..., K) -> (..., N) float32. `weight`:
    rotated_weight(solution), where the caller keeps it."""
    plan = solution.plan
    rows = _sixteen_bit_rows(x, sixteen_bit_of(solution, x.dtype))
    with torch.autocast(rows.device.type, enabled=False):
        drawn = fake_quantize_rows(rotate(rows, plan.rotation), plan.activation_bits)
    weight = rotated_weight(solution) if weight is None else weight
    return _shaped_as(x, _with_bias(_matmul(drawn, weight), solution.bias))


def rotated_forward(x: Tensor, solution: RotatedSolution, *, weight: Tensor | None = None) -> Tensor:
    """The layer as comfy-kitchen's kernels run it: rotated and quantized in float32, the result rounded to 16 bits
    once. `x` (..., K) -> (..., N) in x's dtype. `weight`: see `rotated_exact`."""
    return rotated_exact(x, solution, weight=weight).to(sixteen_bit_of(solution, x.dtype)).to(x.dtype)


# ------------------------------------------------------------------------------------------ modules


def keep_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a converted module makes of a conversion of its buffers: only the device of it.

    `.to(dtype)`, `.half()` and the like change nothing: a checkpoint's numbers are stored in the dtypes that its
    runtime reads, and rounding them once more would make another model. `.to(device)` moves them.
    """
    return lambda tensor: tensor.to(fn(tensor.new_empty(0)).device)


@dataclass(frozen=True, slots=True, eq=False)
class RunningBranch:
    """What a converted layer adds to the product of its codes, and what LoRAs change while it runs."""

    down: Tensor  # (R, K)
    up: Tensor  # (N, R)
    bias: Tensor | None  # (N,)


class QuantizedLinear(nn.Module):
    """What all converted linears share: nn.Linear's features, buffers that keep their dtype, a weight cache."""

    def __init__(self, codes: Tensor, *, cache_bytes: int) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self._cacheable = 4 * codes.numel() <= cache_bytes
        self._cached_weight: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self._cached_weight = None
        return super()._apply(keep_dtypes(fn), recurse)

    def _weight(self, dequantize: Callable[[], Tensor]) -> Tensor:
        if self._cached_weight is not None:
            return self._cached_weight
        weight = dequantize()
        if self._cacheable:
            self._cached_weight = weight
        return weight


class W4A4Linear(QuantizedLinear):
    """A W4A4Solution in the place of an nn.Linear. Computes `w4a4_forward`."""

    smooth: Tensor
    down: Tensor
    up: Tensor
    codes: Tensor
    scales: Tensor
    outer: Tensor | None
    bias: Tensor | None

    def __init__(
        self, solution: W4A4Solution, *, cache_bytes: int = CACHE_BYTES, unsigned_from: int | None = None
    ) -> None:
        super().__init__(solution.codes, cache_bytes=cache_bytes)
        self.plan = solution.plan
        self.unsigned_from = unsigned_from
        for name in ("smooth", "down", "up", "codes", "scales", "outer", "bias"):
            self.register_buffer(name, getattr(solution, name))

    @property
    def solution(self) -> W4A4Solution:
        return W4A4Solution(
            self.plan, self.smooth, self.down, self.up, self.codes, self.scales, self.outer, self.bias
        )

    @property
    def branch(self) -> RunningBranch:
        return RunningBranch(self.down, self.up, self.bias)

    def set_branch(self, branch: RunningBranch) -> None:
        """Another low-rank branch, of any rank, and another bias."""
        self.plan = replace(self.plan, rank=branch.down.shape[0])
        self.down, self.up, self.bias = branch.down, branch.up, branch.bias

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        solution = self.solution
        weight = self._weight(lambda: w4a4_weight(solution))
        return w4a4_forward(input, solution, weight=weight, unsigned_from=self.unsigned_from)

    def extra_repr(self) -> str:
        precision, rank = self.plan.precision.name, self.up.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, {precision}, rank={rank}"


class W4A16Linear(QuantizedLinear):
    """A W4A16Solution in the place of an nn.Linear. Computes `w4a16_forward`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, solution: W4A16Solution, *, cache_bytes: int = CACHE_BYTES) -> None:
        super().__init__(solution.codes, cache_bytes=cache_bytes)
        self.plan = solution.plan
        for name in ("codes", "scales", "zeros", "bias"):
            self.register_buffer(name, getattr(solution, name))

    @property
    def solution(self) -> W4A16Solution:
        return W4A16Solution(self.plan, self.codes, self.scales, self.zeros, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        solution = self.solution
        return w4a16_forward(input, solution, weight=self._weight(lambda: w4a16_rounded_weight(solution)))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, w4a16"


class RotatedLinear(QuantizedLinear):
    """A RotatedSolution in the place of an nn.Linear. Computes `rotated_forward`."""

    codes: Tensor
    scales: Tensor
    row_scales: Tensor | None
    bias: Tensor | None

    def __init__(self, solution: RotatedSolution, *, cache_bytes: int = CACHE_BYTES) -> None:
        super().__init__(solution.codes, cache_bytes=cache_bytes)
        self.plan = solution.plan
        for name in ("codes", "scales", "row_scales", "bias"):
            self.register_buffer(name, getattr(solution, name))

    @property
    def solution(self) -> RotatedSolution:
        return RotatedSolution(self.plan, self.codes, self.scales, self.row_scales, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        solution = self.solution
        return rotated_forward(x, solution, weight=self._weight(lambda: rotated_weight(solution)))

    def extra_repr(self) -> str:
        bits, rotation = self.plan.activation_bits, self.plan.rotation
        return f"in_features={self.in_features}, out_features={self.out_features}, w4a{bits}, rotation={rotation}"


def quantized_linear(
    solution: LayerSolution, *, cache_bytes: int = CACHE_BYTES, unsigned_from: int | None = None
) -> W4A4Linear | W4A16Linear | RotatedLinear:
    """The module that runs a solution. `unsigned_from`: see `w4a4_forward`."""
    match solution:
        case W4A4Solution():
            return W4A4Linear(solution, cache_bytes=cache_bytes, unsigned_from=unsigned_from)
        case W4A16Solution():
            return W4A16Linear(solution, cache_bytes=cache_bytes)
        case RotatedSolution():
            return RotatedLinear(solution, cache_bytes=cache_bytes)


# ------------------------------------------------------------------------------------------ shared steps


def _sixteen_bit_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """rows . weight^T in float32, also where the caller runs under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear(rows, weight.float())


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.float()


def _shaped_as(x: Tensor, y: Tensor) -> Tensor:
    return y.reshape(*x.shape[:-1], y.shape[-1])
