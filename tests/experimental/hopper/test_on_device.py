"""Hopper's own kernels on the GPU that is here, against their references. Skipped without a Hopper, unless
SVDQ_REQUIRE_GPU=1. The self-tests of these kernels are in test_on_device.py with all others."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper import (
    operators,  # noqa: F401  defines torch.ops.svdq
    reference,
)
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import HopperOperands
from svdq_cli.gpu.launch import CudaDevice, cuda_device
from tests.gpu.operands import SHAPES, Shape, assert_agrees, on_device, random_hopper_operands, random_rows

GPU = torch.device("cuda", 0)
LARGE = (Shape(4608, 3072, 3072, 32), Shape(512, 12288, 3072, 32), Shape(4096, 3072, 9216, 128))
LAUNCHES = int(os.environ.get("SVDQ_LAUNCHES", "1000"))
RANKS = (0, 32, 64, 128)
NARROW = 5e-4  # of the largest number: fp8 sums of about 14 bits
MODES = [pytest.param(mode, id=mode.label) for mode in HopperMode]


def _lack() -> str | None:
    try:
        found = cuda_device(GPU).architecture
    except EnvironmentLacksError as lack:
        return lack.message
    return None if found.hopper_modes else f"needs a Hopper GPU, not one of {found.target}"


if os.environ.get("SVDQ_REQUIRE_GPU") != "1" or "needs a Hopper" in (_lack() or ""):
    pytestmark = pytest.mark.skipif(bool(_lack()), reason=f"needs a Hopper GPU: {_lack()}")


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    return cuda_device(GPU)


def layer_on_gpu(shape: Shape, mode: HopperMode, *, seed: int) -> HopperOperands:
    return on_device(random_hopper_operands(shape, mode, torch.bfloat16, seed=seed), GPU)


def shapes() -> list[Shape]:
    return [replace(shape, rank=RANKS[index % 4]) for index, shape in enumerate(SHAPES)] + list(LARGE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.label)
def test_a_layer_matches_its_reference(shape: Shape, mode: HopperMode, gpu: CudaDevice):
    layer = layer_on_gpu(shape, mode, seed=shape.m)
    x = random_rows(shape, torch.bfloat16, seed=shape.m).to(GPU)
    wanted = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
    found = hopper.quantize_down(gpu, x, layer.inverse_smooth, layer.down, mode=mode)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    if shape.rank:
        assert_agrees(found[2], wanted[2], slack=1e-4)
    how = {"m": shape.m, "n": shape.n, "mode": mode}
    y = hopper.gemm(gpu, wanted, layer.product, **how)
    expected = reference.gemm(wanted, layer.product, **how)
    if mode == HopperMode.EXACT:
        assert_agrees(y, expected, exact=shape.rank == 0, slack=1e-4)
    else:
        assert_agrees(y, expected, differing=0.2, slack=NARROW)


@pytest.mark.parametrize("shape", [Shape(129, 128, 192, 32), Shape(4608, 3072, 12288, 32)], ids=str)
def test_gelu_quantize_matches_its_reference(shape: Shape, gpu: CudaDevice):
    layer = layer_on_gpu(shape, HopperMode.EXACT, seed=1)
    after = layer_on_gpu(Shape(shape.m, shape.n, 256, 32), HopperMode.EXACT, seed=2)
    x = random_rows(shape, torch.bfloat16, seed=1).to(GPU)
    quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=HopperMode.EXACT)
    tensors = (quantized, layer.product, after.input)
    found = hopper.gelu_quantize(gpu, *tensors, m=shape.m)
    expected = reference.gelu_quantize(*tensors, m=shape.m)
    assert (found[0] != expected[0]).float().mean() < 0.02
    assert (found[1] != expected[1]).float().mean() < 0.01
    assert_agrees(found[2], expected[2], differing=0.05, slack=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_many_launches_give_the_same_bits(mode: HopperMode, gpu: CudaDevice):
    shape = Shape(1100, 3072, 1536, 32)
    layer = layer_on_gpu(shape, mode, seed=1)
    x = random_rows(shape, torch.bfloat16, seed=1).to(GPU)

    def layer_once() -> Tensor:
        quantized = hopper.quantize_down(gpu, x, layer.inverse_smooth, layer.down, mode=mode)
        return hopper.gemm(gpu, quantized, layer.product, m=shape.m, n=shape.n, mode=mode)

    first = layer_once()
    different = torch.zeros((), dtype=torch.long, device=GPU)
    for _ in range(LAUNCHES):
        different += (layer_once() != first).any()
    assert int(different) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_runs_in_a_cuda_graph(mode: HopperMode, gpu: CudaDevice):
    shape = Shape(129, 320, 256, 32)
    layer = layer_on_gpu(shape, mode, seed=1)
    x = random_rows(shape, torch.bfloat16, seed=1).to(GPU)

    def layer_once() -> Tensor:
        how = {"mode": mode.label}
        quantized = torch.ops.svdq.hopper_quantize_down(x, layer.inverse_smooth, layer.down, **how)
        return torch.ops.svdq.hopper_gemm(*quantized, *layer.product, m=shape.m, n=shape.n, **how)

    wanted = layer_once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer_once()
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)
