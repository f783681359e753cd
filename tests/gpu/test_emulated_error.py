"""The kernels' own source on the CPU against a layer's definition in float64: no more error than 16 bits bring."""

from __future__ import annotations

import pytest
from torch import Tensor

from svdq_cli.bench.operations import w4a4_float64, without_branch
from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import pack_hopper
from svdq_cli.records import Int4, NvFp4, Precision, W4A4Solution
from svdq_cli.runtime import ops
from svdq_cli.runtime.operands import pack_w4a4
from tests.gpu.emulation import EmulatedDevice, needs_compiler
from tests.runtime.test_fused import activations, random_w4a4

pytestmark = needs_compiler

AWKWARD_ROWS = (1, 7, 127, 129, 4608)
MOST_ERROR = 2e-3  # rounding the definition itself to bfloat16 costs 1.55e-3 to 1.8e-3 on these shapes
K, N = 128, 128


def definition(x: Tensor, solution: W4A4Solution) -> Tensor:
    """Float64, but for the hidden vector, which every runtime rounds to 16 bits in the middle of the branch."""
    hidden = (x.double() @ solution.down.double().T).to(solution.up.dtype)
    return w4a4_float64(x, without_branch(solution)) + hidden.double() @ solution.up.double().T


def portable(x: Tensor, solution: W4A4Solution) -> Tensor:
    layer, precision, device = pack_w4a4(solution), solution.plan.precision, EmulatedDevice()
    quantized = ops.quantize_down.launch(device, x, layer.inverse_smooth, layer.down, precision=precision)
    how = {"m": x.shape[0], "n": N, "precision": precision}
    return ops.w4a4_gemm.launch(device, quantized, layer.product, **how)


def hopper_exact(x: Tensor, solution: W4A4Solution) -> Tensor:
    mode, device = HopperMode.EXACT, EmulatedDevice()
    layer = pack_hopper(solution, mode)
    quantized = hopper.quantize_down(device, x, layer.inverse_smooth, layer.down, mode=mode)
    return hopper.gemm(device, quantized, layer.product, m=x.shape[0], n=N, mode=mode)


@pytest.mark.parametrize(
    ("run", "precision"),
    [
        pytest.param(portable, Int4(), id="int4"),
        pytest.param(portable, NvFp4(), id="nvfp4"),
        pytest.param(hopper_exact, Int4(), id="hopper exact"),
    ],
)
def test_a_layer_is_its_definition_but_for_16_bits(run, precision: Precision):
    for index, rank in enumerate(range(0, 129, 16)):
        solution = random_w4a4(precision, n=N, k=K, rank=rank)
        x = activations(AWKWARD_ROWS[index % len(AWKWARD_ROWS)], K)
        wanted = definition(x, solution)
        error = float((run(x, solution).double() - wanted).norm() / wanted.norm())
        assert error <= MOST_ERROR, (x.shape[0], rank)
