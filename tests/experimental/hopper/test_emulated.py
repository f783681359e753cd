"""Hopper's own kernels, their source run on the CPU, against their torch references: fibers for threads, bulk copies
that happen at once or as late as they may, products that are computed when they are waited for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper import reference
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.tiles import (
    pack_feature_scales,
    pack_rows,
    pack_signed_codes,
    pack_token_scales,
    unpack_rows,
)
from svdq_cli.gpu.compile import Variant
from svdq_cli.pack.kernel_tiles import unpack_row_codes, unpack_row_scales
from svdq_cli.pack.padding import pad
from svdq_cli.records import GELU_SHIFT, Int4
from svdq_cli.runtime import ops  # defines torch.ops.svdq
from svdq_cli.runtime.ops.arithmetic import quantize_rows, signed
from tests.gpu.emulation import EmulatedDevice, build, needs_compiler
from tests.gpu.operands import SHAPES, Shape, assert_agrees, random_hopper_operands, random_rows

pytestmark = needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16
MODES = [pytest.param(mode, id=mode.label) for mode in HopperMode]
DEVICES = (EmulatedDevice(), EmulatedDevice(descending=True))
RANKS = (0, 32, 64, 128)
# mode, tile, rank: one build each
QUANTIZERS = (
    *((HopperMode.EXACT, hopper.SMALL_TOKENS, rank) for rank in RANKS[:3]),
    (HopperMode.EXACT, hopper.TOKENS, 32),
    (HopperMode.EXACT, hopper.SMALL_TOKENS, 96),  # in two chunks of 48
    (HopperMode.W4A8, hopper.TOKENS, 32),
    (HopperMode.W4A8, hopper.SMALL_TOKENS, 32),
    (HopperMode.FP8, hopper.SMALL_TOKENS, 32),
)
# Of the largest number of a result: the tensor core's fp8 sums keep 13 bits behind the leading one of 32 products
NARROW = 5e-4


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All variants of this file, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, dict.fromkeys(_variants())))


def _variants() -> Iterator[Variant]:
    large, small = hopper.TOKENS, hopper.SMALL_TOKENS
    for tokens in (large, small):
        for mode in HopperMode:
            yield hopper.gemm_variant(BF16, mode, tokens=tokens)
        yield hopper.reduce_hidden_variant(BF16, tokens=tokens)
        yield hopper.gelu_quantize_variant(BF16, tokens=tokens, next_unsigned=tokens == large)
    yield hopper.gemm_variant(FP16, HopperMode.EXACT, tokens=small)
    for mode, tokens, rank in QUANTIZERS:
        yield hopper.quantize_down_variant(BF16, mode, tokens=tokens, rank=rank)


def hopper_shapes() -> Iterator[Shape]:
    """The shapes of all kernels with ranks in 32s, and one of many tiles for few blocks, with a group that fills no
    stage."""
    for index, shape in enumerate(SHAPES):
        yield replace(shape, rank=RANKS[index % 4])
    yield Shape(400, 448, 384, 32)


def test_shapes_use_both_tiles_and_wrap_the_ring():
    shapes = list(hopper_shapes())
    assert {hopper.token_tile(shape.m) for shape in shapes} == {hopper.TOKENS, hopper.SMALL_TOKENS}
    assert {1, 7, 127, 129, 4608} <= {shape.m for shape in shapes}
    largest = shapes[-1]
    tiles = -(-largest.m // hopper.token_tile(largest.m)) * (largest.n // hopper.FEATURES)
    assert tiles > 2 * EmulatedDevice().multiprocessors
    stages = hopper.stages_that_fit(HopperMode.EXACT, hopper.token_tile(largest.m))
    assert tiles // EmulatedDevice().multiprocessors * (largest.k // 128 + largest.rank // 32) > stages


# ------------------------------------------------------------------------------------------ quantize_down


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: f"{q[0].label}-{q[1]}-r{q[2]}")
def test_quantize_down_matches_its_reference(quantizer: tuple[HopperMode, int, int]):
    mode, tokens, rank = quantizer
    shapes = (shape for shape in hopper_shapes() if hopper.token_tile(shape.m) == tokens)
    for seed, shape in enumerate(shapes):
        shape = replace(shape, rank=rank)
        layer = random_hopper_operands(shape, mode, BF16, seed=seed)
        x = random_rows(shape, BF16, seed=seed)
        expected = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        found = hopper.quantize_down(DEVICES[seed % 2], x, layer.inverse_smooth, layer.down, mode=mode)
        assert torch.equal(found[0], expected[0]), shape
        assert torch.equal(found[1], expected[1]), shape
        if shape.rank:
            assert_agrees(unpack_rows(found[2]), unpack_rows(expected[2]))


def test_exact_codes_and_scales_are_those_of_the_portable_kernels():
    shape = Shape(33, 192, 128, 32)
    layer = random_hopper_operands(shape, HopperMode.EXACT, BF16, seed=3)
    x = random_rows(shape, BF16, seed=3)
    codes, scales, _ = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=HopperMode.EXACT)
    rows = pad(x, multiples=(hopper.padded_tokens(33), 1), fill=0)
    portable = quantize_rows(rows, layer.inverse_smooth, precision=Int4(), unsigned=False, shift=0.0)
    nibbles = unpack_row_codes(portable[0])
    assert torch.equal(unpack_rows(codes).view(torch.float8_e4m3fn).float(), signed(nibbles))
    restored = reference.unpack_token_scales(scales) * reference.CODE_UNIT
    assert torch.equal(restored, unpack_row_scales(portable[1]).float())


def test_splitting_k_over_blocks_changes_only_the_order_of_sums():
    shape = Shape(40, 64 * 33, 128, 32)
    layer = random_hopper_operands(shape, HopperMode.EXACT, BF16, seed=0)
    x = random_rows(shape, BF16, seed=0)
    mode = HopperMode.EXACT
    wide = EmulatedDevice(multiprocessors=8)
    found = hopper.quantize_down(wide, x, layer.inverse_smooth, layer.down, mode=mode)
    expected = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert_agrees(found[2], expected[2])


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_in_the_input_is_not_lost(mode: HopperMode):
    shape = Shape(7, 128, 128, 32)
    layer = random_hopper_operands(shape, mode, BF16, seed=1)
    x = random_rows(shape, BF16, seed=1)
    x[3, 70] = float("nan")
    found = hopper.quantize_down(DEVICES[0], x, layer.inverse_smooth, layer.down, mode=mode)
    found[2].zero_()  # the branch brings a NaN of its own
    y = hopper.gemm(DEVICES[0], found, layer.product, m=7, n=128, mode=mode)
    assert y[3].isnan().all()
    assert not y[torch.arange(7) != 3].isnan().any()


# ------------------------------------------------------------------------------------------ gemm


@pytest.mark.parametrize("mode", MODES)
def test_gemm_matches_its_reference(mode: HopperMode):
    for seed, shape in enumerate(hopper_shapes()):
        layer = random_hopper_operands(shape, mode, BF16, seed=seed)
        x = random_rows(shape, BF16, seed=seed)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        how = {"m": shape.m, "n": shape.n, "mode": mode}
        y = hopper.gemm(DEVICES[seed % 2], quantized, layer.product, **how)
        expected = reference.gemm(quantized, layer.product, **how)
        if mode == HopperMode.EXACT:
            assert_agrees(y, expected, exact=shape.rank == 0)
        else:
            assert_agrees(y, expected, differing=0.2, slack=NARROW)


def test_gemm_in_float16_matches_its_reference():
    mode = HopperMode.EXACT
    for seed, shape in enumerate((Shape(7, 192, 136, 32), Shape(127, 128, 128, 0))):
        layer = random_hopper_operands(shape, mode, FP16, seed=seed)
        x = random_rows(shape, FP16, seed=seed)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        how = {"m": shape.m, "n": shape.n, "mode": mode}
        y = hopper.gemm(DEVICES[seed], quantized, layer.product, **how)
        assert_agrees(y, reference.gemm(quantized, layer.product, **how), exact=shape.rank == 0)


@pytest.mark.parametrize("unsigned", [False, True])
def test_group_sums_are_exact_integers_in_a_narrow_accumulator(unsigned: bool):
    """Extreme codes; the bias takes away what 16 bits can't show, so that every last unit is seen."""
    draw = torch.Generator().manual_seed(0)
    low, high = (0, 15) if unsigned else (-8, 7)
    k, n, tile = 64, 128, hopper.token_tile(1)
    rows = torch.tensor([low, high, high - 1])[torch.randint(0, 3, (1, k), generator=draw)]
    columns = torch.tensor([-7, 7, -6, 1])[torch.randint(0, 4, (n, k), generator=draw)]
    columns[0], columns[1] = -7, 7
    for row in (rows, torch.full((1, k), low), torch.full((1, k), high)):
        exact = (row.double() @ columns.double().T)[0]
        bias = (-exact).half()
        codes = torch.zeros(tile, k)
        codes[0] = row
        ones = torch.ones(tile, 1)
        y = hopper.gemm(
            DEVICES[0],
            (
                pack_rows(codes.to(torch.float8_e4m3fn).view(torch.uint8), tile=tile),
                pack_token_scales(ones / reference.CODE_UNIT, tile=tile),
                torch.zeros(1, 0, 4, tile, 8, dtype=FP16),
            ),
            hopper.HopperProduct(
                pack_signed_codes(columns.to(torch.int8), tile=n),
                pack_feature_scales(torch.ones(n, 1, dtype=FP16), tile=n),
                torch.zeros(1, 0, 4, n, 8, dtype=FP16),
                bias,
            ),
            **{"m": 1, "n": n, "mode": HopperMode.EXACT},
        )
        assert torch.equal(y[0].double(), exact + bias.double())


# ------------------------------------------------------------------------------------------ gelu_quantize


def pairs_of_layers() -> Iterator[tuple[Shape, Shape]]:
    """Two layers, the second reading what the first gives."""
    for index, shape in enumerate(hopper_shapes()):
        first = replace(shape, n=(128, 192, 256)[index % 3], k=min(shape.k, 128))
        yield first, Shape(shape.m, first.n, 128, RANKS[index // 2 % 4])


def test_gelu_quantize_matches_its_reference():
    assert len(set(pairs_of_layers())) >= 50
    for seed, (shape, next_shape) in enumerate(pairs_of_layers()):
        layer = random_hopper_operands(shape, HopperMode.EXACT, BF16, seed=seed)
        after = random_hopper_operands(next_shape, HopperMode.EXACT, BF16, seed=seed + 1)
        x = random_rows(shape, BF16, seed=seed)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=HopperMode.EXACT)
        unsigned = hopper.token_tile(shape.m) == hopper.TOKENS  # one build for each tile
        how = {"m": shape.m, "next_unsigned": unsigned, "shift": GELU_SHIFT if unsigned else 0.0}
        tensors = (quantized, layer.product, after.input)
        found = hopper.gelu_quantize(DEVICES[seed % 2], *tensors, **how)
        expected = reference.gelu_quantize(*tensors, **how)
        # One rounding of y or of the GELU apart moves a code by one, or a scale by its last bit
        assert share_of_different(found[0], expected[0]) < 0.02, shape
        assert share_of_different(found[1], expected[1]) < 0.01, shape
        if after.down.shape[1]:
            assert_agrees(found[2], expected[2], differing=0.03, slack=1e-4)


def share_of_different(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).float().mean())


# ------------------------------------------------------------------------------------------ reduce_hidden


def test_reduce_hidden_matches_its_reference():
    draw = torch.Generator().manual_seed(0)
    for case in range(56):
        tile = (hopper.TOKENS, hopper.SMALL_TOKENS)[case % 2]
        splits, tiles, rank = 1 + case % 7, 1 + case % 3, 32 * (1 + case % 8)
        partial = torch.randn(splits, tiles * tile, rank, generator=draw)
        hidden = torch.zeros(tiles, rank // 32, 4, tile, 8, dtype=BF16)
        hopper.reduce_hidden(DEVICES[case % 2], partial, hidden)
        assert torch.equal(unpack_rows(hidden), ops.reduce_hidden.reference(partial).to(BF16))


def test_an_empty_input_gives_an_empty_result():
    mode = HopperMode.EXACT
    layer = random_hopper_operands(Shape(1, 128, 128, 32), mode, BF16, seed=0)
    x = torch.empty(0, 128, dtype=BF16)
    nothing = hopper.quantize_down(DEVICES[0], x, layer.inverse_smooth, layer.down, mode=mode)
    assert hopper.gemm(DEVICES[0], nothing, layer.product, m=0, n=128, mode=mode).shape == (0, 128)
