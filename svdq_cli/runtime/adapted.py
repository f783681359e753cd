"""A converted layer that has no branch of its own, with one next to it: what a LoRA adds to a W4A16 layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.runtime.linear import RunningBranch, keep_dtypes


class AdaptedLinear(nn.Module):
    """base(x) + (x down^T) up^T + bias; the sums are float32."""

    down: Tensor
    up: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Module, branch: RunningBranch) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = branch.down.shape[1], branch.up.shape[0]
        for name in ("down", "up", "bias"):
            self.register_buffer(name, getattr(branch, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLinear:
        return super()._apply(keep_dtypes(fn), recurse)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = input.to(self.down.dtype).float()
        added = F.linear(F.linear(rows, self.down.float()), self.up.float())
        y = self.base(input).float() + added
        return (y if self.bias is None else y + self.bias.float()).to(input.dtype)
