"""What layers on the CUDA kernels have in common, whichever kernels they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.records import W4A4Plan, W4A4Solution, W4A16Plan
from svdq_cli.runtime.input_quantizer import InputQuantizer
from svdq_cli.runtime.linear import RunningBranch, keep_dtypes
from svdq_cli.runtime.ops.records import Quantized
from svdq_cli.system.offload import brought, is_hooked

# Fusing two layers saves the activation between them: 4 M N bytes, written and read as 16 bits. It costs the partial
# hidden vectors of the second layer's branch, one for each of N / 128 blocks of columns: M N R / 16 bytes, written and
# read as float32. From this rank on nothing is saved.
UNFUSED_RANK = 64


class KernelLinear(nn.Module):
    """nn.Linear's features, and buffers that keep their dtype (`keep_dtypes`)."""

    def __init__(self, plan: W4A4Plan | W4A16Plan, tensors: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        self.in_features, self.out_features = plan.linear.in_features, plan.linear.out_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KernelLinear:
        return super()._apply(keep_dtypes(fn), recurse)


class KernelW4A4Linear(KernelLinear, ABC):
    """A W4A4 layer in two kernels: the first quantizes its input and projects it down, the second multiplies."""

    up: Tensor
    bias: Tensor | None

    def __init__(
        self,
        plan: W4A4Plan,
        quantizer: InputQuantizer,
        product: Mapping[str, Tensor | None],
        *,
        unsigned: bool,
        shift: float,
    ) -> None:
        """`product`: what the second kernel reads, by the name of its parameter. `unsigned`: the input's codes are
        0..15, after `shift` has been added to it."""
        super().__init__(plan, product)
        self.plan, self.unsigned, self.shift = plan, unsigned, shift
        self._product_names = tuple(product)
        self.quantizer, self.reader = quantizer, 0

    @property
    def product(self) -> tuple[Tensor | None, ...]:
        """What the second kernel reads of the layer, in the order of its parameters. Packed from
        (N, K) codes, (N, K/G) scales, (N, R) and (N,)."""
        return tuple([getattr(self, name) for name in self._product_names])

    @property
    @abstractmethod
    def solution(self) -> W4A4Solution:
        """The solution as it is run: with a shifted bias where `unsigned`."""

    @property
    @abstractmethod
    def branch(self) -> RunningBranch: ...

    @abstractmethod
    def packed_branch(self, branch: RunningBranch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Down, up and bias as the kernels read them. From (R, K), (N, R) and (N,)."""

    @abstractmethod
    def multiply(self, quantized: Quantized, m: int) -> Tensor:
        """(M, N) in the checkpoint's dtype."""

    @abstractmethod
    def feeds(self, after: KernelW4A4Linear) -> bool:
        """Whether `multiply_gelu_quantize` can make the input of the layer `after`."""

    @abstractmethod
    def multiply_gelu_quantize(self, quantized: Quantized, m: int, after: KernelW4A4Linear) -> Quantized:
        """This layer's product, GELU by tanh, and the input of the layer `after`."""

    def parts(self, quantized: Quantized, m: int) -> Iterator[tuple[slice, Quantized]]:
        """The rows of a quantized input that are worth computing at a time, and what is quantized of them."""
        yield slice(0, m), quantized

    def beside_attention(self, after: KernelW4A4Linear) -> FusedFeedForward | None:
        """This layer, GELU by tanh, and the layer `after`, which reads an attention's output before the GELU's, as one
        module; None where no kernel runs them so. The module is called with what this layer reads in the place of the
        GELU's result."""
        return None

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.finished(self.quantize(input), input)

    def quantize(self, x: Tensor) -> Quantized:
        """`x` (..., K) in any float dtype."""
        return self.quantizer(x, self.reader)

    def finished(self, quantized: Quantized, x: Tensor) -> Tensor:
        """The result in the shape and dtype of the input `x` that `quantized` was made of. (..., K) -> (..., N)."""
        y = self.multiply(quantized, x.shape[:-1].numel())
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def read_through(self, quantizer: InputQuantizer, *, reader: int) -> None:
        """Take the input from a quantizer that others read too, and that makes the same of it as this layer's own."""
        self.quantizer.leave(self.reader)
        self.quantizer, self.reader = quantizer, reader

    def set_branch(self, branch: RunningBranch) -> None:
        """Another low-rank branch, of any rank, and another bias. The layer no longer shares its quantizer."""
        self.plan = replace(self.plan, rank=branch.down.shape[0])
        down, self.up, self.bias = self.packed_branch(branch)
        self.read_through(self.quantizer.with_down(down), reader=0)


class FusedFeedForward(nn.Module):
    """Linear, GELU by tanh, linear: the activation between the two is never written."""

    def __init__(self, first: KernelW4A4Linear, second: KernelW4A4Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        read = (self.first, self.second, self.second.quantizer)
        if any(map(is_hooked, read)):
            with brought(read):
                return self._fused(x)
        return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        return self.joined(x, self.first.quantize(x))

    def joined(self, x: Tensor, quantized: Quantized) -> Tensor:
        """The result, in the dtype and with the rows of `x` (..., any). `quantized`: what the first layer reads."""
        rows = x.reshape(-1, x.shape[-1])
        m = rows.shape[0]
        y: Tensor | None = None
        for some, part in self.first.parts(quantized, m):
            found = self.second.finished(self._between(rows[some], part), rows[some])
            if found.shape[0] == m:
                y = found
            else:
                y = found.new_empty(m, self.second.out_features) if y is None else y
                y[some] = found
        assert y is not None
        return y.reshape(*x.shape[:-1], self.second.out_features)

    def _between(self, rows: Tensor, quantized: Quantized) -> Quantized:
        """What the second layer reads of some rows of `joined`'s x. A branch that was added since may make it better to
        run the two one after the other."""
        if not self.first.feeds(self.second):
            y = self.first.multiply(quantized, rows.shape[0])
            return self.second.quantize(F.gelu(y, approximate="tanh"))
        return self.first.multiply_gelu_quantize(quantized, rows.shape[0], self.second)


def fused_feed_forward(first: nn.Module, second: nn.Module) -> FusedFeedForward | None:
    """The two layers as one module; None where no kernel runs them together."""
    if not (isinstance(first, KernelW4A4Linear) and isinstance(second, KernelW4A4Linear)):
        return None
    return FusedFeedForward(first, second) if first.feeds(second) else None
