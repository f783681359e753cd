"""1x1 convolutions are linear layers over channels: which modules count as such, and how their tensors are turned."""

from __future__ import annotations

from torch import Tensor, nn


def is_pointwise(module: nn.Module) -> bool:
    """Whether `module` is a convolution that mixes channels only: one pixel in, one pixel out, every channel seen."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C): what a linear layer reads where the convolution reads `x`."""
    return x.movedim(1, -1)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), the inverse of `channels_last`."""
    return x.movedim(-1, 1)
