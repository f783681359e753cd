"""Every kernel's own source, run on the CPU lane by lane, against its torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import splits_of
from svdq_cli.pack.kernel_tiles import (
    pack_column_scales,
    pack_row_codes,
    pack_row_scales,
    pack_weight_codes,
    unpack_hidden_fragments,
)
from svdq_cli.records import GELU_SHIFT, Int4, NvFp4, Precision
from svdq_cli.runtime import ops  # defines torch.ops.svdq
from svdq_cli.runtime.ops.records import Product
from tests.gpu.emulation import EmulatedDevice, build, needs_compiler
from tests.gpu.operands import (
    SHAPES,
    Shape,
    assert_agrees,
    assert_w4a4_layer_matches_its_reference,
    random_operands,
    random_rows,
    random_shapes,
    random_w4a16,
)

pytestmark = needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16
# How each card multiplies: precision, signedness, dtype, and the architecture whose instruction it is.
PRODUCTS = {
    "int4-s8": (Int4(), False, BF16, "sm_90a"),
    "int4-s4": (Int4(), False, BF16, "sm_80"),
    "int4-s4-unsigned": (Int4(), True, BF16, "sm_89"),
    "int4-s8-unsigned": (Int4(), True, BF16, "sm_90a"),
    "int4-sm75": (Int4(), False, FP16, "sm_75"),
    "nvfp4-bf16": (NvFp4(), False, BF16, "sm_90a"),
    "nvfp4-fp16": (NvFp4(), False, FP16, "sm_75"),
    "nvfp4-mxf4": (NvFp4(), False, BF16, "sm_120a"),
}
QUANTIZERS = {
    "int4": (Int4(), False, BF16),
    "int4-fp16": (Int4(), False, FP16),
    "int4-unsigned": (Int4(), True, BF16),
    "nvfp4": (NvFp4(), False, BF16),
}
OTHER_RANKS = {"int4-fp16": (32, 32), "int4-unsigned": (32, 32), "nvfp4": (64, 128)}  # one build each
FUSED = {"int4-s8": True, "int4-sm75": False, "nvfp4-bf16": False}  # product: next layer's codes unsigned

INTEGER_TARGETS = ("sm_75", "sm_80", "sm_90a")  # one for each instruction that multiplies int4 codes


def devices(target: str) -> tuple[EmulatedDevice, EmulatedDevice]:
    """Threads in both orders."""
    device = EmulatedDevice(architecture(target))
    return device, replace(device, descending=True)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All variants of this file, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, dict.fromkeys(_variants())))


def _variants() -> Iterator[Variant]:
    for name, (precision, unsigned, dtype) in QUANTIZERS.items():
        for rank in range(0, 129, 16) if name == "int4" else OTHER_RANKS[name]:
            yield ops.quantize_down.variant(dtype, precision, rank=rank, unsigned=unsigned)
    for dtype in (BF16, FP16):
        yield ops.reduce_hidden.variant(dtype)
        yield ops.w4a16_linear.variant(dtype)
    for name, (precision, unsigned, dtype, target) in PRODUCTS.items():
        kind = architecture(target)
        if isinstance(precision, Int4) and target in INTEGER_TARGETS:
            small = variants.block_rows(1)
            for u in (False, True):
                yield ops.w4a4_gemm.variant(FP16, precision, kind, block_m=small, unsigned=u)
        for block_m in map(variants.block_rows, (1, 129)):
            how = {"block_m": block_m, "unsigned": unsigned}
            yield ops.w4a4_gemm.variant(dtype, precision, kind, **how)
            if name in FUSED:
                yield ops.w4a4_gelu_quantize.variant(dtype, precision, kind, next_unsigned=FUSED[name], **how)


# ------------------------------------------------------------------------------------------ quantize_down


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantize_down_matches_its_reference(name: str):
    precision, unsigned, dtype = QUANTIZERS[name]
    shift = GELU_SHIFT if unsigned else 0.0
    for seed, shape in enumerate(SHAPES):
        if name != "int4":
            shape = replace(shape, rank=OTHER_RANKS[name][seed % 2])
        layer = random_operands(shape, precision, dtype, seed=seed)
        x = random_rows(shape, dtype, seed=seed)
        x = x.abs() if unsigned else x
        how = {"precision": precision, "unsigned": unsigned, "shift": shift}
        reference = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, **how)
        device = devices("sm_80")[seed % 2]
        codes, scales, hidden = ops.quantize_down.launch(device, x, layer.inverse_smooth, layer.down, **how)
        assert torch.equal(codes, reference[0]), shape
        assert torch.equal(scales, reference[1]), shape
        if shape.rank:
            assert_agrees(hidden, reference[2])


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda precision: precision.name)
def test_splitting_k_over_blocks_changes_only_the_order_of_sums(precision: Precision):
    shape = Shape(40, 64 * 33, 128, 32)
    layer = random_operands(shape, precision, BF16, seed=0)
    x = random_rows(shape, BF16, seed=0)
    wide = EmulatedDevice(multiprocessors=8)
    assert splits_of(wide, 4, shape.k) == 2
    codes, scales, hidden = ops.quantize_down.launch(
        wide, x, layer.inverse_smooth, layer.down, precision=precision
    )
    reference = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, precision=precision)
    assert torch.equal(codes, reference[0])
    assert torch.equal(scales, reference[1])
    assert_agrees(hidden, reference[2])


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda precision: precision.name)
def test_a_nan_in_the_input_is_not_lost(precision: Precision):
    shape = Shape(7, 128, 128, 32)
    layer = random_operands(shape, precision, BF16, seed=1)
    x = random_rows(shape, BF16, seed=1)
    x[3, 70] = float("nan")
    device = EmulatedDevice()
    quantized = ops.quantize_down.launch(device, x, layer.inverse_smooth, layer.down, precision=precision)
    quantized[2].zero_()  # the branch brings a NaN of its own
    y = ops.w4a4_gemm.launch(device, quantized, layer.gemm, m=7, n=128, precision=precision)
    assert y[3].isnan().all()
    assert not y[torch.arange(7) != 3].isnan().any()


def test_multiplying_by_the_reciprocal_rounds_as_dividing_does():
    """All pairs of significands of bfloat16, and a sample of float16's."""
    ones = torch.arange(128, 256, dtype=torch.float32)
    quotient, product = ones[:, None] / ones, ones[:, None] * (1 / ones)
    assert torch.equal(quotient.bfloat16(), product.bfloat16())
    ones = torch.arange(1024, 2048, dtype=torch.float32)
    quotient, product = ones[:, None] / ones, ones[:, None] * (1 / ones)
    assert torch.equal(quotient.half(), product.half())


def test_an_input_that_begins_at_an_odd_place_and_an_empty_one():
    shape = Shape(7, 128, 128, 32)
    layer = random_operands(shape, Int4(), BF16, seed=1)
    device = EmulatedDevice()
    whole = torch.empty(7 * 128 + 3, dtype=BF16)
    whole[3:] = random_rows(shape, BF16, seed=1).flatten()
    x = whole[3:].view(7, 128)
    assert x.data_ptr() % 16
    found = ops.quantize_down.launch(device, x, layer.inverse_smooth, layer.down, precision=Int4())
    wanted = ops.quantize_down.launch(device, x.clone(), layer.inverse_smooth, layer.down, precision=Int4())
    assert torch.equal(found[0], wanted[0])
    nothing = ops.quantize_down.launch(device, x[:0], layer.inverse_smooth, layer.down, precision=Int4())
    y = ops.w4a4_gemm.launch(device, nothing, layer.gemm, m=0, n=128, precision=Int4())
    assert y.shape == (0, 128)


# ------------------------------------------------------------------------------------------ reduce_hidden


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_reduce_hidden_matches_its_reference(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    for case in range(50):
        splits, mp, rank = 1 + case % 7, 32 * (1 + case % 5), 16 * (1 + case % 8)
        partial = torch.randn(splits, mp, rank, generator=draw)
        hidden = torch.zeros(rank // 16, mp // 16, 32, 8, dtype=dtype)
        ops.reduce_hidden.launch(EmulatedDevice(), partial, hidden)
        assert torch.equal(unpack_hidden_fragments(hidden), ops.reduce_hidden.reference(partial).to(dtype))


# ------------------------------------------------------------------------------------------ w4a4_gemm


@pytest.mark.parametrize("name", PRODUCTS)
def test_w4a4_gemm_matches_its_reference(name: str):
    precision, unsigned, dtype, target = PRODUCTS[name]
    for seed, shape in enumerate(SHAPES):
        layer = random_operands(shape, precision, dtype, seed=seed)
        x = random_rows(shape, dtype, seed=seed)
        quantized = ops.quantize_down.reference(
            *(x.abs() if unsigned else x, layer.inverse_smooth, layer.down),
            precision=precision,
            unsigned=unsigned,
        )
        how = {"m": shape.m, "n": shape.n, "precision": precision, "unsigned": unsigned}
        device = devices(target)[seed % 2]
        y = ops.w4a4_gemm.launch(device, quantized, layer.gemm, **how)
        reference = ops.w4a4_gemm.reference(quantized, layer.gemm, **how)
        # Without a branch every int4 operation has one order
        assert_agrees(y, reference, exact=shape.rank == 0 and isinstance(precision, Int4))


@pytest.mark.parametrize("precision", [Int4(), NvFp4()], ids=lambda precision: precision.name)
def test_random_shapes_match_their_reference(precision: Precision):
    for seed, shape in enumerate(random_shapes(50)):
        assert_w4a4_layer_matches_its_reference(
            *(devices("sm_90a")[seed % 2], shape, precision, BF16), seed=seed, device=torch.device("cpu")
        )


@pytest.mark.parametrize("target", INTEGER_TARGETS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_group_sums_are_exact_integers(target: str, unsigned: bool):
    """Extreme codes; the bias takes away what 16 bits can't show, so that every last unit is seen."""
    draw = torch.Generator().manual_seed(0)
    low, high = (0, 15) if unsigned else (-8, 7)
    k, n = 64, 128
    extremes = torch.tensor([low, high, high - 1])
    rows = extremes[torch.randint(0, 3, (1, k), generator=draw)]
    columns = torch.tensor([-8, 7, -7])[torch.randint(0, 3, (n, k), generator=draw)]
    columns[0], columns[1] = -8, 7
    for row in (rows, torch.full((1, k), low), torch.full((1, k), high)):
        exact = (row.double() @ columns.double().T)[0]
        bias = (-exact).half()
        padded = torch.cat((row, torch.zeros(31, k, dtype=torch.long))).to(torch.int8)
        ones = torch.ones(32, 1, dtype=torch.float16)
        y = ops.w4a4_gemm.launch(
            EmulatedDevice(architecture(target)),
            (pack_row_codes(padded), pack_row_scales(ones), torch.zeros(0, 2, 32, 8, dtype=torch.float16)),
            Product(
                pack_weight_codes(columns.to(torch.int8)),
                pack_column_scales(ones[:1].expand(n, 1).contiguous()),
                torch.zeros(0, n // 16, 32, 8, dtype=torch.float16),
                outer=None,
                bias=bias,
            ),
            **{"m": 1, "n": n, "precision": Int4(), "unsigned": unsigned},
        )
        assert torch.equal(y[0].double(), exact + bias.double())


# ------------------------------------------------------------------------------------------ w4a4_gelu_quantize


@pytest.mark.parametrize("name", FUSED)
def test_w4a4_gelu_quantize_matches_its_reference(name: str):
    precision, _, dtype, target = PRODUCTS[name]
    next_unsigned = FUSED[name]
    for seed, shape in enumerate(SHAPES):
        shape = replace(shape, n=(128, 192, 256)[seed % 3], k=min(shape.k, 128))
        layer = random_operands(shape, precision, dtype, seed=seed)
        after = random_operands(
            Shape(shape.m, shape.n, 128, (48, 0, 32, 128)[seed % 4]), precision, dtype, seed=seed + 1
        )
        x = random_rows(shape, dtype, seed=seed)
        quantized = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, precision=precision)
        how = {"m": shape.m, "precision": precision, "next_unsigned": next_unsigned}
        how["shift"] = GELU_SHIFT if next_unsigned else 0.0
        arguments = (quantized, layer.gemm, after.input)
        device = devices(target)[seed % 2]
        codes, scales, hidden = ops.w4a4_gelu_quantize.launch(device, *arguments, **how)
        reference = ops.w4a4_gelu_quantize.reference(*arguments, **how)
        # One rounding of y or of the GELU apart moves a code by one, or a scale by its last bit
        assert (codes != reference[0]).float().mean() < 0.02, shape
        assert (scales != reference[1]).float().mean() < 0.01, shape
        if after.down.shape[1]:
            assert_agrees(hidden, reference[2], differing=0.03, slack=1e-4)  # of inputs one rounding apart


# ------------------------------------------------------------------------------------------ w4a16_linear


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_w4a16_linear_matches_its_reference(dtype: torch.dtype):
    for seed, shape in enumerate(SHAPES):
        x = random_rows(shape, dtype, seed=seed)
        weight, scales, bias = random_w4a16(shape, dtype, seed=seed)
        device = devices("sm_80")[seed % 2]
        y = ops.w4a16_linear.launch(device, x, weight, scales, bias, n=shape.n)
        assert_agrees(y, ops.w4a16_linear.reference(x, weight, scales, bias, n=shape.n))


# ------------------------------------------------------------------------------------------ the emulator itself


def test_there_are_at_least_50_shapes_with_the_awkward_ones_among_them():
    assert len(set(SHAPES)) >= 50
    assert {1, 7, 127, 129, 4608} <= {shape.m for shape in SHAPES}
    assert {shape.rank for shape in SHAPES} == set(range(0, 129, 16))
