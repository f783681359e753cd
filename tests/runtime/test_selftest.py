"""The self-test of `svdq doctor` runs every kernel, and fails where a kernel is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.selftest import RING_K, RING_N, SMALL_M, kernel_cases
from svdq_cli.runtime.selftest import M
from tests.gpu.emulation import HOPPER, EmulatedDevice, needs_compiler

CPU = torch.device("cpu")
CASES = {f"{case.op} {case.precision} {case.mode}": case for case in kernel_cases(torch.bfloat16, HOPPER)}


RESULTS = {  # which of a kernel's arguments it writes
    "quantize_down": (3, 4, 5),
    "reduce_hidden": (1,),
    "w4a4_gemm": (8,),
    "w4a4_gelu_quantize": (10, 11, 12),
    "w4a16_linear": (4,),
    "hopper_quantize_down": (3, 4, 5),
    "hopper_reduce_hidden": (1,),
    "hopper_gemm": (7,),
    "hopper_gelu_quantize": (9, 10, 11),
}


@dataclass(frozen=True, slots=True)
class DeadDevice(EmulatedDevice):
    """Its kernels write one number everywhere."""

    number: float = 0.0

    def launch(self, variant, grid, threads, *arguments) -> None:
        for index in RESULTS[variant.kernel]:
            result = arguments[index]
            if isinstance(result, Tensor):
                result.fill_(self.number if result.is_floating_point() else 0)


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "quantize_down int4 signed",
        "w4a4_gemm int4 signed",
        "w4a16_linear int4 -",
        *(name for name in CASES if name.startswith("hopper")),
    ],
)
def test_a_kernel_that_is_right_passes(name: str):
    case = CASES[name]
    assert case.disagreement(EmulatedDevice(), CPU) <= case.most


@pytest.mark.parametrize("number", [0.0, float("nan")])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_that_does_nothing_fails(name: str, number: float):
    case = CASES[name]
    assert not case.disagreement(DeadDevice(number=number), CPU) <= case.most


def test_the_gemms_of_hopper_go_round_their_rings_with_either_tile():
    """Parities return, tiles follow one another in a block, a stage is half full."""
    stages, groups = -(-RING_K // 128) + 1, RING_K // 64
    assert groups % 2 == 1
    for m, tokens in ((M, hopper.TOKENS), (SMALL_M, hopper.SMALL_TOKENS)):
        assert hopper.token_tile(m) == tokens
        visits = stages * (RING_N // hopper.FEATURES) * -(-m // tokens)
        for mode in HopperMode:
            assert visits > 2 * hopper.stages_that_fit(mode, tokens), (mode, tokens)
    names = {f"{mode.label}{end}" for mode in HopperMode for end in ("", ", 128 tokens")}
    assert {case.mode for case in CASES.values() if case.op == "hopper_gemm"} == names
