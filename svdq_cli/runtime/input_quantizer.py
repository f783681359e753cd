"""The first kernel of W4A4 layers. It runs once for all layers that read the same activation, such as q, k and v."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdq_cli.runtime.linear import keep_dtypes
from svdq_cli.runtime.ops.records import Quantized


class _Kept(NamedTuple):
    """A result that other readers will ask for."""

    activation: Tensor
    version: int | None  # torch counts what is written into a tensor, but not in inference mode
    quantized: Quantized
    waiting: tuple[int, ...]  # the readers that have not had it


class InputQuantizer(nn.Module):
    """An operator of torch.ops.svdq with its smoothing factors and down projection.

    Layers that share one are its readers, numbered from 0. The first that comes with an activation pays; the others get
    the same result if they come with the same tensor, each of them once. Nothing is kept when the last has had it. They
    must be called one after another, before anything is written into the activation. Eager mode sees such a write, and
    quantizes again; torch.compile and inference mode don't.
    """

    smoothing: Tensor
    down: Tensor

    def __init__(
        self,
        kernel: Callable[..., Quantized],
        smoothing: Tensor,
        down: Tensor,
        *,
        dtype: torch.dtype,
        readers: int = 1,
        takes_any_rows: bool = False,
        **options: str | bool | float | None,
    ) -> None:
        """`smoothing` (K,) as the operator reads it: the CUDA kernels' float32 reciprocals, the CPU engine's own
        factors. `down` packed, `dtype` what activations are rounded to, `options` the operator's. `takes_any_rows`: the
        operator rounds float32 itself, and reads strided rows."""
        super().__init__()
        self.register_buffer("smoothing", smoothing)
        self.register_buffer("down", down)
        self.kernel, self.dtype, self.options = kernel, dtype, options
        self.takes_any_rows = takes_any_rows
        self.readers = tuple(range(readers))
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, object]:
        """Pickled, an operator of torch is its name."""
        state: dict[str, object] = self.__dict__.copy()
        if isinstance(self.kernel, torch._ops.OpOverloadPacket):
            state["kernel"] = str(self.kernel)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(name := state["kernel"], str):
            state = {**state, "kernel": operator.attrgetter(name)(torch.ops)}
        super().__setstate__(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputQuantizer:
        return super()._apply(keep_dtypes(fn), recurse)

    def forward(self, x: Tensor, reader: int = 0) -> Quantized:
        """`x` (..., K) in any float dtype, quantized as its M rows."""
        kept, version = self._kept, _version(x)
        if kept is not None and kept.activation is x and kept.version == version and reader in kept.waiting:
            waiting = tuple(other for other in kept.waiting if other != reader)
            self._kept = kept._replace(waiting=waiting) if waiting else None
            return kept.quantized
        quantized = self.kernel(self.rows(x), self.smoothing, self.down, **self.options)
        waiting = tuple(other for other in self.readers if other != reader)
        self._kept = _Kept(x, version, quantized, waiting) if waiting else None
        return quantized

    def rows(self, x: Tensor) -> Tensor:
        """An activation (..., K) as the rows (M, K) that the operator reads."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.takes_any_rows:
            return rows.to(self.dtype).contiguous()
        rows = rows if rows.dtype == torch.float32 else rows.to(self.dtype)
        return rows if rows.stride(-1) == 1 else rows.contiguous()

    def for_readers(self, readers: int) -> InputQuantizer:
        """The quantized input that several layers share."""
        return self._like(self.down, readers)

    def with_down(self, down: Tensor) -> InputQuantizer:
        """The quantizer with a different down projection, for one layer. It is packed from (R, K)."""
        return self._like(down, 1)

    def _like(self, down: Tensor, readers: int) -> InputQuantizer:
        return InputQuantizer(
            *(self.kernel, self.smoothing, down),
            dtype=self.dtype,
            readers=readers,
            takes_any_rows=self.takes_any_rows,
            **self.options,
        )

    def leave(self, reader: int) -> None:
        """Remove a reader that now has its own quantizer."""
        self.readers = tuple(other for other in self.readers if other != reader)
        self._kept = None

    @property
    def _numbers(self) -> dict[str, str | bool | float | None]:
        """The options that change a number. `n`, the reader's features, only decides where they are stored."""
        return {name: value for name, value in self.options.items() if name != "n"}

    def equals(self, other: InputQuantizer) -> bool:
        """Whether both make the same of every activation."""
        if (self.kernel, self.dtype, self._numbers) != (other.kernel, other.dtype, other._numbers):
            return False
        mine, theirs = (self.smoothing, self.down), (other.smoothing, other.down)
        return all(
            a.device == b.device and a.shape == b.shape and torch.equal(a, b)
            for a, b in zip(mine, theirs, strict=True)
        )

    def extra_repr(self) -> str:
        return f"in_features={self.smoothing.shape[0]}, readers={len(self.readers)}"


def _version(x: Tensor) -> int | None:
    """How often something was written into a tensor; None where versions are not counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
