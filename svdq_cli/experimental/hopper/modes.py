"""The arithmetics of Hopper's own int4 kernels. Hopper has no 4-bit unit; its fp8 unit holds int4 codes exactly."""

from __future__ import annotations

from enum import IntEnum


class HopperMode(IntEnum):
    """What multiplies on sm_90a. The values are those of kernels/experimental/hopper/hopper_tiles.cuh."""

    EXACT = 0  # 4-bit codes on both sides, as the checkpoint says
    W4A8 = 1  # the checkpoint's 4-bit weights; activations e4m3, one scale a token
    FP8 = 2  # weights too are e4m3, one scale an output channel: twice the checkpoint's memory

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def exactness(self) -> str:
        """What a result of this mode is, next to the checkpoint's definition."""
        return _EXACTNESS[self]


_EXACTNESS = {
    HopperMode.EXACT: "exact integers in each group, one float32 fma a group",
    HopperMode.W4A8: "4-bit weights exact; activations rounded to e4m3 with a scale a token; "
    "fp8 sums of about 14 bits in each group, one float32 fma a group",
    HopperMode.FP8: "weights and activations rounded to e4m3 with a scale a row; "
    "fp8 sums of about 14 bits over 128 columns, float32 beyond",
}


def hopper_mode(label: str) -> HopperMode:
    """The mode of that label. Raises KeyError for another."""
    return HopperMode[label.upper()]
