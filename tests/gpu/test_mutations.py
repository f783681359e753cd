"""What the emulator would notice: kernels that are wrong on purpose, in the ways that NOTES.md lists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper import reference
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu.architectures import architecture
from svdq_cli.records import Int4
from svdq_cli.runtime import ops
from tests.gpu.emulation import EmulatedDevice, mutated, needs_compiler
from tests.gpu.operands import Shape, random_hopper_operands, random_operands, random_rows

pytestmark = needs_compiler

BF16 = torch.bfloat16
PIPELINE, PRODUCT, BLOCK = "hopper_pipeline.cuh", "hopper_product.cuh", "hopper_block.cuh"


@dataclass(frozen=True, slots=True)
class Mutation:
    name: str
    file: str
    text: str
    other: str


HOPPER = (
    Mutation(
        "a stage is given back before it is read",
        PRODUCT,
        """        multiply_stage(acc, ring.at(place), in.groups_of(step), me);
        ring.release(place, me.lane);
""",
        """        ring.release(place, me.lane);
        multiply_stage(acc, ring.at(place), in.groups_of(step), me);
""",
    ),
    Mutation(
        "no wait for a stage",
        PRODUCT,
        """        ring.wait_full(place);
        multiply_stage(""",
        """        multiply_stage(""",
    ),
    Mutation(
        "half the arrivals", PIPELINE, "empty + stage, CONSUMER_WARPS", "empty + stage, CONSUMER_WARPS / 2"
    ),
    Mutation("a parity that never flips", PIPELINE, "parity ^= 1;", ""),
    Mutation(
        "products are not waited for",
        PRODUCT,
        """    wgmma_wait<0>();
    add_sums(""",
        """    add_sums(""",
    ),
    Mutation(
        "results are read before all have stored them",
        BLOCK,
        """            meet_warpgroup(me);
            finish(""",
        """            finish(""",
    ),
    Mutation(
        "no wait for a stage's release",
        PIPELINE,
        "        wait_phase(empty + place.stage, place.parity ^ 1);\n",
        "",
    ),
    Mutation(
        "the descriptor's two offsets are exchanged",
        "matrix_descriptor.cuh",
        "u64(leading >> 4) << 16 | u64(stride >> 4) << 32",
        "u64(stride >> 4) << 16 | u64(leading >> 4) << 32",
    ),
    Mutation(
        "a result is staged before all have read the one before",
        BLOCK,
        "            meet_warpgroup(me); // all have read the tile before\n",
        "",
    ),
)
# Threads in both orders, and a consumer warp that comes last: a whole tile behind, as no round-robin scheduler has it
ORDERS = (EmulatedDevice(), EmulatedDevice(descending=True), EmulatedDevice(lazy_warp=5))


def hopper_gemm_is_right(sources: Path | None) -> bool:
    """One block: tiles of one stage on a ring of seven, so that warps may be a tile apart; then a ring that goes
    round."""
    mode = HopperMode.EXACT
    for shape in (Shape(100, 128, 384, 0), Shape(100, 448, 384, 32)):
        layer = random_hopper_operands(shape, mode, BF16, seed=1)
        x = random_rows(shape, BF16, seed=1)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        how = {"m": shape.m, "n": shape.n, "mode": mode}
        wanted = reference.gemm(quantized, layer.product, **how).float()
        for order in ORDERS:
            device = replace(order, multiprocessors=1, sources=sources)
            try:
                y = hopper.gemm(device, quantized, layer.product, **how).float()
            except AssertionError:  # the emulator: threads that wait for ever, reads outside
                return False
            if not (y - wanted).norm() <= 1e-2 * wanted.norm():
                return False
    return True


def test_hoppers_gemm_is_right_unchanged_in_every_order():
    assert hopper_gemm_is_right(None)


@pytest.mark.parametrize("mutation", HOPPER, ids=lambda mutation: mutation.name)
def test_a_change_to_hoppers_gemm_is_noticed(mutation: Mutation, tmp_path: Path):
    assert not hopper_gemm_is_right(mutated(tmp_path, mutation.file, mutation.text, mutation.other))


PAIR_BARRIERS = [
    pytest.param("        float* to = next.partial", id="first"),
    pytest.param("    }\n}\n\nextern", id="second"),
]


def gelu_quantize_is_right(sources: Path | None) -> bool:
    mode, shape = HopperMode.EXACT, Shape(100, 128, 256, 0)
    layer = random_hopper_operands(shape, mode, BF16, seed=1)
    after = random_hopper_operands(Shape(100, 256, 128, 64), mode, BF16, seed=2)
    x = random_rows(shape, BF16, seed=1)
    quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
    tensors = (quantized, layer.product, after.input)
    wanted = reference.gelu_quantize(*tensors, m=shape.m)[2].float()
    for order in (*ORDERS, EmulatedDevice(lazy_warp=9)):
        device = replace(order, multiprocessors=1, sources=sources)
        try:
            hidden = hopper.gelu_quantize(device, *tensors, m=shape.m)[2].float()
        except AssertionError:
            return False
        if not (hidden - wanted).norm() <= 1e-2 * wanted.norm():
            return False
    return True


def test_gelu_quantize_is_right_unchanged_in_every_order():
    assert gelu_quantize_is_right(None)


@pytest.mark.parametrize("behind", PAIR_BARRIERS)
def test_a_pair_barrier_that_is_left_out_is_noticed(behind: str, tmp_path: Path):
    barrier = "        meet(PAIR_BARRIERS + me.warp, CONSUMERS * LANES);\n"
    assert not gelu_quantize_is_right(mutated(tmp_path, "hopper_gelu_quantize.cu", barrier + behind, behind))


PORTABLE = (
    Mutation(
        "a step is not waited for",
        "gemm_pipeline.cuh",
        """        wait_copies<STAGES - 2>();
        __syncthreads(); // the step""",
        """        __syncthreads(); // the step""",
    ),
    Mutation(
        "threads don't meet before a stage is filled again",
        "gemm_pipeline.cuh",
        "        __syncthreads(); // the step is there, and the one before it has been read\n",
        "",
    ),
    Mutation(
        "the stage that is filled is the one that is read",
        "gemm_pipeline.cuh",
        "step + AHEAD, free, mine);\n        multiply_group",
        "step + AHEAD, stage, mine);\n        multiply_group",
    ),
    Mutation(
        "the branch's steps begin one too late",
        "gemm_pipeline.cuh",
        "const int tile = step - in.groups;",
        "const int tile = step - in.groups + 1;",
    ),
    Mutation(
        "scales of the step before",
        "gemm_pipeline.cuh",
        "COLUMN_VECTORS, in, step, mine);",
        "COLUMN_VECTORS, in, step > 0 ? step - 1 : 0, mine);",
    ),
)


def portable_gemm_is_right(sources: Path | None) -> bool:
    kind = architecture("sm_80")
    for shape in (Shape(129, 64, 128, 32), Shape(129, 448, 128, 48)):
        layer = random_operands(shape, Int4(), BF16, seed=1)
        x = random_rows(shape, BF16, seed=1)
        quantized = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, precision=Int4())
        how = {"m": shape.m, "n": shape.n, "precision": Int4()}
        wanted = ops.w4a4_gemm.reference(quantized, layer.gemm, **how).float()
        for order in ORDERS:
            device = replace(order, architecture=kind, sources=sources)
            try:
                y = ops.w4a4_gemm.launch(device, quantized, layer.gemm, **how).float()
            except AssertionError:
                return False
            if not (y - wanted).norm() <= 1e-2 * wanted.norm():
                return False
    return True


def test_the_portable_gemm_is_right_unchanged_in_every_order():
    assert portable_gemm_is_right(None)


@pytest.mark.parametrize("mutation", PORTABLE, ids=lambda mutation: mutation.name)
def test_a_change_to_the_portable_gemm_is_noticed(mutation: Mutation, tmp_path: Path):
    assert not portable_gemm_is_right(mutated(tmp_path, mutation.file, mutation.text, mutation.other))
