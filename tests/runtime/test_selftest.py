"""The self-test of `svdq doctor` runs every kernel, and fails where a kernel is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from svdq_cli.runtime.selftest import kernel_cases
from tests.gpu.emulation import EmulatedDevice, needs_compiler

CPU = torch.device("cpu")
CASES = {f"{case.op} {case.precision} {case.mode}": case for case in kernel_cases(torch.bfloat16)}


@dataclass(frozen=True, slots=True)
class DeadDevice(EmulatedDevice):
    """Launches nothing, so that results stay as allocated: zeros."""

    def launch(self, variant, grid, threads, *arguments) -> None:
        for argument in arguments[3:]:
            if isinstance(argument, Tensor):
                argument.zero_()


@needs_compiler
@pytest.mark.parametrize(
    "name", ["quantize_down int4 signed", "w4a4_gemm int4 signed", "w4a16_linear int4 -"]
)
def test_a_kernel_that_is_right_passes(name: str):
    case = CASES[name]
    assert case.disagreement(EmulatedDevice(), CPU) <= case.most


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_that_does_nothing_fails(name: str):
    case = CASES[name]
    assert not case.disagreement(DeadDevice(), CPU) <= case.most
