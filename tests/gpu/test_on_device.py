"""The kernels on the GPU that is here, against their references. Skipped without one, unless SVDQ_REQUIRE_GPU=1."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.experimental.hopper.selftest import kernel_cases
from svdq_cli.gpu.architectures import Architecture, architecture
from svdq_cli.gpu.launch import CudaDevice, cuda_device
from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.runtime import ops  # defines torch.ops.svdq
from svdq_cli.runtime.selftest import KernelCase
from tests.gpu.operands import (
    SHAPES,
    Shape,
    assert_agrees,
    assert_w4a4_layer_matches_its_reference,
    on_device,
    random_operands,
    random_rows,
    random_shapes,
    random_w4a16,
)

GPU = torch.device("cuda", 0)
LARGE = (Shape(4608, 3072, 3072, 32), Shape(512, 12288, 3072, 32), Shape(4096, 3072, 9216, 128))
LAUNCHES = int(os.environ.get("SVDQ_LAUNCHES", "1000"))
PRECISIONS = [pytest.param(Int4(), id="int4"), pytest.param(NvFp4(), id="nvfp4")]


def _lack() -> str | None:
    try:
        cuda_device(GPU)
    except EnvironmentLacksError as lack:
        return lack.message
    return None


def _kind() -> Architecture:
    """Of the GPU that is here; some kind where there is none, and every test is skipped."""
    return architecture("sm_80") if _lack() else cuda_device(GPU).architecture


if os.environ.get("SVDQ_REQUIRE_GPU") != "1":
    pytestmark = pytest.mark.skipif(bool(_lack()), reason=f"needs a GPU: {_lack()}")


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    return cuda_device(GPU)


@pytest.fixture(scope="module")
def dtype(gpu: CudaDevice) -> torch.dtype:
    return torch.bfloat16 if gpu.architecture.bfloat16 else torch.float16


@pytest.mark.parametrize(
    "case",
    list(kernel_cases(torch.bfloat16, _kind())),
    ids=lambda case: f"{case.op}-{case.precision}-{case.mode}",
)
def test_self_test(case: KernelCase, gpu: CudaDevice):
    assert case.disagreement(gpu, GPU) <= case.most


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=lambda shape: shape.label)
def test_a_w4a4_layer_matches_its_reference(
    shape: Shape, precision: Precision, gpu: CudaDevice, dtype: torch.dtype
):
    assert_w4a4_layer_matches_its_reference(
        gpu, shape, precision, dtype, seed=shape.m, device=GPU, slack=1e-4
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_launches_match_their_reference(precision: Precision, gpu: CudaDevice, dtype: torch.dtype):
    for seed, shape in enumerate(random_shapes(LAUNCHES)):
        assert_w4a4_layer_matches_its_reference(
            gpu, shape, precision, dtype, seed=seed, device=GPU, slack=1e-4
        )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_a_w4a16_layer_matches_its_reference(shape: Shape, gpu: CudaDevice, dtype: torch.dtype):
    weight, scales, bias = random_w4a16(shape, dtype, seed=shape.m)
    x = random_rows(shape, dtype, seed=shape.m).to(GPU)
    tensors = (x, weight.to(GPU), scales.to(GPU), None if bias is None else bias.to(GPU))
    found = ops.w4a16_linear.launch(gpu, *tensors, n=shape.n)
    assert_agrees(found, ops.w4a16_linear.reference(*tensors, n=shape.n), slack=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_launches_give_the_same_bits(precision: Precision, gpu: CudaDevice, dtype: torch.dtype):
    shape = Shape(1100, 3072, 1536, 32)
    layer = on_device(random_operands(shape, precision, dtype, seed=1), GPU)
    x = random_rows(shape, dtype, seed=1).to(GPU)

    def layer_once() -> Tensor:
        quantized = ops.quantize_down.launch(gpu, x, layer.inverse_smooth, layer.down, precision=precision)
        return ops.w4a4_gemm.launch(gpu, quantized, layer.gemm, m=shape.m, n=shape.n, precision=precision)

    first = layer_once()
    different = torch.zeros((), dtype=torch.long, device=GPU)
    for _ in range(LAUNCHES):
        different += (layer_once() != first).any()
    assert int(different) == 0


def test_a_layer_runs_in_a_cuda_graph(gpu: CudaDevice, dtype: torch.dtype):
    shape = Shape(129, 320, 256, 32)
    layer = on_device(random_operands(shape, Int4(), dtype, seed=1), GPU)
    x = random_rows(shape, dtype, seed=1).to(GPU)

    def layer_once() -> Tensor:
        quantized = torch.ops.svdq.quantize_down(x, layer.inverse_smooth, layer.down, precision="int4")
        return torch.ops.svdq.w4a4_gemm(*quantized, *layer.gemm, m=shape.m, n=shape.n, precision="int4")

    wanted = layer_once()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer_once()
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)


def test_kernels_run_on_torchs_current_stream(gpu: CudaDevice, dtype: torch.dtype):
    """A kernel on another stream would not wait for the sleep, and read zeros."""
    shape = Shape(129, 320, 256, 32)
    weight, scales, bias = (None if t is None else t.to(GPU) for t in random_w4a16(shape, dtype, seed=1))
    source = random_rows(shape, dtype, seed=1).to(GPU)
    wanted = ops.w4a16_linear.launch(gpu, source, weight, scales, bias, n=shape.n)  # type: ignore[arg-type]
    x = torch.zeros_like(source)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.copy_(source)
        found = ops.w4a16_linear.launch(gpu, x, weight, scales, bias, n=shape.n)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
