"""What a GPU's benchmark measures, run on a CPU: the kernels' references, baselines that a CPU has, a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from svdq_cli.bench.baselines import gpu_baselines, int8_mm, scaled_mm_fp8
from svdq_cli.bench.cases import BenchSettings
from svdq_cli.bench.hopper_operations import hopper_float64, hopper_operations
from svdq_cli.bench.kernel_operations import kernel_operations
from svdq_cli.bench.operations import Operation, w4a4_float64
from svdq_cli.bench.plot import draw_plot
from svdq_cli.bench.run import bench_shapes, precisions_named, with_steps
from svdq_cli.bench.shapes import SHAPE_SETS, LinearShape, ShapeSet
from svdq_cli.bench.step import (
    Arithmetic,
    StepSettings,
    arithmetics,
    random_w4a4,
    random_w4a16,
    step_rows,
)
from svdq_cli.bench.timing import bytes_per_microsecond
from svdq_cli.bench.transformer import FLUX1_DEV_STEP, TransformerShape, attention_by_rows, rotated
from svdq_cli.cli.render import show
from svdq_cli.cpu.build import find_compiler
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.records import Int4, NvFp4, Precision

CPU = torch.device("cpu")
PRECISIONS = [pytest.param(Int4(), id="int4"), pytest.param(NvFp4(), id="nvfp4")]
SMALL_STEP = TransformerShape("small", 128, 2, 256, double=1, single=2, image_tokens=9, text_tokens=5)
M, K, N = 9, 128, 192


def error_of(operation: Operation) -> float:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).to(operation.dtype)
    wanted = operation.define(x)
    found = operation.rows_of(operation.module(*operation.prepare(x)))
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------ operations


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_is_measured_whole_and_in_parts(precision: Precision):
    torch.manual_seed(0)
    found = list(kernel_operations(random_w4a4(K, N, 32, precision, CPU), M))
    assert [(operation.op, operation.mode, operation.rank) for operation in found] == [
        ("w4a4 linear", "kernels", 32),
        ("w4a4 linear", "kernels", 0),
        ("w4a4 gemm", "kernels", 32),
        ("w4a4 gemm", "kernels", 0),
        ("w4a4 gemm", "kernels + torch branch", 32),
        ("quantize and down", "kernels", 32),
    ]
    for operation in found:
        # The unfused branch is rounded three times, everything else once or twice
        assert error_of(operation) < (4e-3 if "+" in operation.mode else 2.5e-3), operation.label


@pytest.mark.parametrize("mode", HopperMode, ids=lambda mode: mode.label)
def test_a_layer_is_measured_in_every_mode_of_hopper(mode: HopperMode):
    torch.manual_seed(0)
    found = [
        operation
        for operation in hopper_operations(random_w4a4(K, N, 32, Int4(), CPU), M)
        if operation.mode == f"hopper {mode.label}"
    ]
    assert [(operation.op, operation.rank) for operation in found] == [
        ("w4a4 linear", 32),
        ("w4a4 gemm", 32),
        ("w4a4 gemm", 0),
        ("quantize and down", 32),
    ]
    for operation in found:
        assert error_of(operation) < 2.5e-3, operation.label
    assert all(mode.exactness in operation.exactness for operation in found[:3])
    x, codes, hidden, down = 2 * M * K, M * K, 2 * M * 32, 2 * 32 * K
    scales = 4 * (M * K // 64 if mode == HopperMode.EXACT else M)
    assert found[-1].least_bytes == x + codes + scales + hidden + down


def test_the_modes_differ_in_their_definition_and_exact_is_the_contracts():
    torch.manual_seed(0)
    solution = random_w4a4(K, N, 32, Int4(), CPU)
    x = torch.randn(M, K).bfloat16()
    exact = w4a4_float64(x, solution)
    assert torch.equal(hopper_float64(x, solution, HopperMode.EXACT), exact)
    for mode in (HopperMode.W4A8, HopperMode.FP8):
        difference = float((hopper_float64(x, solution, mode) - exact).norm() / exact.norm())
        assert 0.05 < difference < 0.3  # 4-bit activations round that much, 8-bit ones hardly


def test_the_first_kernels_least_bytes_are_its_operands():
    operation = list(kernel_operations(random_w4a4(K, N, 32, Int4(), CPU), M))[-1]
    x, codes, scales, hidden, down = 2 * M * K, M * K // 2, 2 * M * K // 64, 2 * M * 32, 2 * 32 * K
    assert operation.least_bytes == x + codes + scales + hidden + down


def test_a_modulation_layer_is_measured():
    (operation,) = kernel_operations(random_w4a16(K, N, CPU), M)
    assert operation.op == "w4a16 linear"
    assert error_of(operation) < 5e-3


def test_integer_and_fp8_baselines_are_what_they_say():
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) / K**0.5
    x = torch.randn(32, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = int8_mm(weight)
    assert torch.equal(exact.module(*exact.prepare(x)).double(), exact.define(x))
    rows, scales = scaled_mm_fp8(weight).prepare(x)
    assert rows.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(rows.float() * scales, x.float(), rtol=2**-4, atol=2**-9)


def test_small_inputs_are_not_given_to_int_mm():
    assert "torch._int_mm" not in dict(gpu_baselines(1))
    assert "torch._int_mm" in dict(gpu_baselines(17))


# ------------------------------------------------------------------------------------------ a step


def test_a_step_is_measured_in_16_bit_and_converted():
    torch.manual_seed(0)
    settings = StepSettings(SMALL_STEP, CPU, rank=16, seconds=1e-3)
    hopper = tuple(Arithmetic(Int4(), mode) for mode in HopperMode)
    models = arithmetics((Int4(), NvFp4()), CPU)
    rows = list(step_rows(settings, (*models, *hopper)))
    assert [(row.precision, row.mode, row.rank) for row in rows] == [
        ("bfloat16", "eager", None),
        ("int4", "eager", 16),
        ("nvfp4", "eager", 16),
        ("int4 hopper exact", "eager", 16),
        ("int4 hopper w4a8", "eager", 16),
        ("int4 hopper fp8", "eager", 16),
    ]
    assert rows[0].ratio == 1.0
    for row in rows:
        assert row.ratio == rows[0].us.median / row.us.median
        assert row.peak_bytes is not None


def test_attention_by_rows_is_torchs_own():
    draw = torch.Generator().manual_seed(0)
    qkv, angles = torch.randn(700, 3 * 2 * 64, generator=draw), torch.rand(700, 32, generator=draw)
    q, k, v = qkv.unflatten(-1, (3, 2, 64)).permute(1, 2, 0, 3)
    q, k = (rotated(torch.nn.functional.rms_norm(part, (64,)), angles) for part in (q, k))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(-2)
    torch.testing.assert_close(attention_by_rows(qkv, angles, 64), wanted)


def test_flux_dev_has_the_linears_of_the_published_model():
    """Width 3072, MLP 12288, 19 + 38 blocks: 11.9 billion parameters, almost all in these."""
    shape = FLUX1_DEV_STEP
    stream = 6 * shape.width**2 + 4 * shape.width**2 + 2 * shape.width * shape.inner
    single = (
        3 * shape.width**2
        + shape.width * (3 * shape.width + shape.inner)
        + (shape.width + shape.inner) * shape.width
    )
    parameters = 2 * shape.double * stream + shape.single * single
    assert 11.7e9 < parameters < 11.9e9


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_a_step_on_a_cpu_is_a_row_with_time_and_memory(monkeypatch: pytest.MonkeyPatch):
    small = TransformerShape("small", 128, 2, 256, 1, 1, 20, 12)
    monkeypatch.setattr("svdq_cli.bench.run.FLUX1_DEV_BLOCKS", small)
    settings = BenchSettings(CPU, seconds_per_row=1e-3)
    shapes = ShapeSet("one", "one layer", (LinearShape("layer", 2, 128, 128),))
    report = bench_shapes(shapes, precisions=precisions_named("int4"), settings=settings)
    found = with_steps(report, precisions_named(None), settings=settings)
    steps = [row for row in found.rows if row.op == "transformer-step"]
    assert [(row.mode, row.precision, row.baseline) for row in steps] == [
        ("torch", "bfloat16", "torch-bf16"),
        ("fused", "int4", "torch-bf16"),
        ("fused", "nvfp4", "torch-bf16"),
    ]
    assert [row.ratio for row in steps] == [steps[0].us.median / row.us.median for row in steps]
    assert all(step.peak_bytes is not None for step in found.steps)
    show(found, json=False)


# ------------------------------------------------------------------------------------------ report


def test_a_plot_has_a_bar_for_every_row(tmp_path: Path):
    shapes = ShapeSet("two", "two layers", (LinearShape("a", 2, 128, 128), LinearShape("b", 3, 128, 128)))
    report = bench_shapes(
        shapes, precisions=precisions_named("int4"), settings=BenchSettings(CPU, seconds_per_row=1e-3)
    )
    draw_plot(report, tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png").convert("RGB")
    column = [image.getpixel((486, y)) for y in range(image.height)]  # just right of where bars begin
    bars = sum(
        pixel != (255, 255, 255) and column[y - 1] == (255, 255, 255) for y, pixel in enumerate(column) if y
    )
    assert bars == len(report.rows)


def test_shape_sets_of_the_papers_models_are_there():
    assert {"flux1-dev", "sdxl", "pixart-sigma"} <= set(SHAPE_SETS)


def test_the_speed_of_copying_is_measured_once():
    speed = bytes_per_microsecond(CPU)
    assert 100 < speed < 10_000_000  # between 0.1 GB/s and 10 TB/s
    assert bytes_per_microsecond(CPU) == speed
