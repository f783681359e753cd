"""Blocks of 256 rows: the same bits as those of 128, on every way through them, and used only where they are proven and
pay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdq_cli.gpu import variants, verdicts
from svdq_cli.gpu.architectures import architecture
from svdq_cli.gpu.launch import CudaDevice
from svdq_cli.gpu.launcher import gemm_rows
from svdq_cli.gpu.verdicts import Verdict, keep_verdict, proven_on, read_verdict, verdict_path
from svdq_cli.inference import backend
from svdq_cli.inference.backend import Backend, with_large_blocks
from svdq_cli.records import GELU_SHIFT, Int4, NvFp4
from svdq_cli.runtime import large_blocks, ops  # defines torch.ops.svdq
from svdq_cli.runtime.large_blocks import prove_large_blocks, run_trial
from svdq_cli.runtime.selftest import large_block_cases
from tests.gpu.emulation import EmulatedDevice, mutated, needs_compiler
from tests.gpu.operands import Shape, random_operands, random_rows

BF16, FP16, CPU = torch.bfloat16, torch.float16, torch.device("cpu")
LARGE, USUAL = variants.LARGE_BLOCK_M, variants.BLOCK_M
# Half a block, whole ones, one row of another, and half of one behind them; steps fewer than the ring's stages
# and many more; no branch and steps of it that are odd in number
SHAPES = [
    Shape(m, (64, 128, 192, 448)[i % 4], (128, 136, 64, 256)[j % 4], (0, 32, 48, 128)[(i + j) % 4])
    for i, m in enumerate((33, 64, 127, 128, 129, 200, 255, 256, 257, 300, 384, 400, 512))
    for j in range(4)
]
PRODUCTS = {
    "int4-s4": (Int4(), False, BF16, "sm_89"),
    "int4-s4-unsigned-fp16": (Int4(), True, FP16, "sm_86"),
    "int4-s8": (Int4(), False, BF16, "sm_90a"),
    "nvfp4-mxf4": (NvFp4(), False, BF16, "sm_120a"),
}


def test_there_are_at_least_50_shapes():
    assert len(set(SHAPES)) >= 50


@needs_compiler
@pytest.mark.parametrize("name", PRODUCTS)
def test_large_blocks_give_the_bits_of_the_others(name: str):
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
        device = EmulatedDevice(architecture(target), descending=bool(seed % 2))
        large, usual = (
            ops.w4a4_gemm.launch(device, quantized, layer.gemm, **how, block_m=block_m)
            for block_m in (LARGE, USUAL)
        )
        assert torch.equal(large, usual), shape


@needs_compiler
@pytest.mark.parametrize("name", ["int4-s4", "nvfp4-mxf4"])
def test_large_blocks_feed_the_next_layer_the_same_bits(name: str):
    precision, _, dtype, target = PRODUCTS[name]
    for seed, shape in enumerate(SHAPES[::4]):
        shape = replace(shape, n=(128, 192, 256)[seed % 3])
        layer = random_operands(shape, precision, dtype, seed=seed)
        after = random_operands(
            Shape(shape.m, shape.n, 128, (48, 0, 32)[seed % 3]), precision, dtype, seed=seed + 1
        )
        x = random_rows(shape, dtype, seed=seed)
        quantized = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, precision=precision)
        unsigned = isinstance(precision, Int4) and bool(seed % 2)
        how = {"m": shape.m, "precision": precision, "next_unsigned": unsigned}
        how["shift"] = GELU_SHIFT if unsigned else 0.0
        device = EmulatedDevice(architecture(target), descending=bool(seed % 2))
        large, usual = (
            ops.w4a4_gelu_quantize.launch(device, quantized, layer.gemm, after.input, **how, block_m=block_m)
            for block_m in (LARGE, USUAL)
        )
        for ours, known in zip(large, usual, strict=True):
            assert torch.equal(ours, known), shape


# ------------------------------------------------------------------------------------------ nothing outside is read

READS = """
import ctypes, mmap, sys
from pathlib import Path
import torch
from svdq_cli.gpu.architectures import architecture
from svdq_cli.records import Int4
from svdq_cli.runtime import ops
from tests.gpu.emulation import EmulatedDevice
from tests.gpu.operands import Shape, random_operands, random_rows

def at_the_end(tensor):
    # Copied so that it ends where a page begins that nothing may be read from
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), page, 0) == 0
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)

kept = []
shape = Shape(300, 192, 128, 32)
layer = random_operands(shape, Int4(), torch.bfloat16, seed=1)
x = random_rows(shape, torch.bfloat16, seed=1)
quantized = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, precision=Int4())
device = EmulatedDevice(architecture("sm_89"), sources=Path(sys.argv[1]) if sys.argv[1:] else None)
guarded = tuple(map(at_the_end, quantized))
how = {"m": 300, "n": 128, "precision": Int4(), "block_m": 256}
ops.w4a4_gemm.launch(device, guarded, layer.gemm, **how)
print("read")
"""


def reads_inside(*sources: str) -> bool:
    words = [sys.executable, "-c", READS, *sources]
    return subprocess.run(words, capture_output=True, text=True).stdout == "read\n"


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_half_a_block_reads_nothing_outside():
    assert reads_inside()


WAYS_OUT = {
    "rows": ("between_rows = whole ? THREADS : 0;", "between_rows = THREADS;"),
    "scales": ("scale = !whole && i >= HALF && i < ROW_SCALE_VECTORS ? i - HALF : i;", "scale = i;"),
}


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("way", WAYS_OUT)
def test_reading_the_other_half_is_noticed(way: str, tmp_path: Path):
    assert not reads_inside(str(mutated(tmp_path, "gemm_pipeline.cuh", *WAYS_OUT[way])))


# ------------------------------------------------------------------------------------------ where they are chosen


@pytest.mark.parametrize(
    ("m", "n", "target", "multiprocessors", "wanted"),
    [
        (4608, 9216, "sm_89", 128, LARGE),  # 21 blocks or 11 large ones a multiprocessor
        (4608, 3072, "sm_89", 128, LARGE),  # 7 or 4
        (512, 3072, "sm_89", 128, USUAL),  # 1 or 1: half of the card would have nothing to do
        (4608, 3072, "sm_86", 82, LARGE),
        (4608, 9216, "sm_120a", 170, USUAL),  # int4 there is bound by its products either way
        (4608, 9216, "sm_75", 72, USUAL),
        (20, 9216, "sm_89", 2, variants.SMALL_BLOCK_M),
    ],
)
def test_large_blocks_are_taken_where_they_fill_the_card(
    m: int, n: int, target: str, multiprocessors: int, wanted: int
):
    device = EmulatedDevice(architecture(target), multiprocessors=multiprocessors)
    assert gemm_rows(replace(device, large_blocks=True), m, n, Int4()) == wanted
    assert gemm_rows(device, m, n, Int4()) == variants.block_rows(m)


def test_equal_predictions_take_the_large_block_only_where_no_wave_is_lost():
    device = EmulatedDevice(architecture("sm_120a"), multiprocessors=170, large_blocks=True)
    assert gemm_rows(device, 4608, 9216, NvFp4()) == LARGE  # 16 blocks or 8 large ones
    assert gemm_rows(device, 4608, 3072, NvFp4()) == LARGE  # 6 or 3
    assert gemm_rows(device, 4096, 3072, NvFp4()) == USUAL  # 5 or 3, which are 6


# ------------------------------------------------------------------------------------------ the trial on a card

GPU_NAME, ADA = "Some RTX 40", architecture("sm_89")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaDevice]:
    """A card of which nothing is known."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU_NAME)
    monkeypatch.setattr(verdicts.nvrtc, "version", lambda: (13, 0))
    proven_on.cache_clear()
    yield CudaDevice(0, ADA, 128)
    proven_on.cache_clear()


def test_a_card_uses_large_blocks_after_a_sound_trial_and_not_before(gpu: CudaDevice):
    assert not gpu.large_blocks
    assert prove_large_blocks(gpu, trial=lambda index: Verdict(True, "the same bits")) == Verdict(
        True, "the same bits"
    )
    assert gpu.large_blocks
    again: list[int] = []
    prove_large_blocks(gpu, trial=again.append)
    assert not again


def test_a_card_on_which_the_trial_failed_keeps_the_blocks_before(
    gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch
):
    prove_large_blocks(gpu, trial=lambda index: Verdict(False, "w4a4_gemm: 0.5 of the numbers are others"))
    assert not gpu.large_blocks
    monkeypatch.setattr(backend, "cuda_device", lambda device: gpu)
    found = with_large_blocks(Backend("kernels", "CUDA kernels for sm_89"), torch.device("cuda"))
    assert found.reason == (
        "CUDA kernels for sm_89, without large blocks (w4a4_gemm: 0.5 of the numbers are others)"
    )
    prove_large_blocks(gpu, again=True, trial=lambda index: Verdict(True, "the same bits"))
    assert gpu.large_blocks


def test_a_trial_that_could_not_run_says_nothing_of_the_card(gpu: CudaDevice):
    assert prove_large_blocks(gpu, trial=lambda index: None) is None
    assert read_verdict(verdict_path(GPU_NAME, ADA)) is None
    assert not gpu.large_blocks


def test_a_card_without_large_blocks_needs_no_trial(gpu: CudaDevice):
    turing = replace(gpu, architecture=architecture("sm_75"))
    asked: list[int] = []
    assert prove_large_blocks(turing, trial=asked.append) is None
    assert not asked


def test_a_verdict_is_of_one_card_and_one_version_of_the_kernels(
    gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch
):
    path = verdict_path(GPU_NAME, ADA)
    others = {verdict_path("Another", ADA), verdict_path(GPU_NAME, architecture("sm_86"))}
    monkeypatch.setattr(verdicts.nvrtc, "version", lambda: (13, 5))
    others.add(verdict_path(GPU_NAME, ADA))
    monkeypatch.setattr(verdicts, "read_source", lambda kernel: "changed")
    others.add(verdict_path(GPU_NAME, ADA))
    assert len(others | {path}) == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sound": "yes"}', '{"sound": 1, "reason": "x"}'])
def test_a_damaged_verdict_proves_nothing(content: str, gpu: CudaDevice):
    path = verdict_path(GPU_NAME, ADA)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert not gpu.large_blocks


def test_a_cache_that_cannot_be_written_is_no_error(gpu: CudaDevice, tmp_path: Path):
    (tmp_path / "kernels").write_text("a file in the place of the folder")
    keep_verdict(verdict_path(GPU_NAME, ADA), Verdict(True, ""))
    assert not gpu.large_blocks


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("print('the same bits')", Verdict(True, "the same bits")),
        ("print('others'); raise SystemExit(3)", Verdict(False, "others")),
        ("print('no memory'); raise SystemExit(4)", None),
        ("import os; os.abort()", Verdict(False, "the trial was killed by signal 6")),
        ("import a_package_that_is_not_here", None),
        ("import time; time.sleep(60)", Verdict(False, "the trial did not end in 2 s")),
    ],
)
def test_what_becomes_of_the_trials_process(
    code: str, wanted: Verdict | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(large_blocks, "TRIAL_SECONDS", 2.0)
    assert run_trial(0, words=(sys.executable, "-c", code)) == wanted


@needs_compiler
@pytest.mark.parametrize(
    "kind", [architecture(target) for target in ("sm_89", "sm_120a")], ids=lambda k: k.target
)
def test_the_trials_cases_agree_and_notice_other_bits(kind, tmp_path: Path):
    cases = list(large_block_cases(BF16, kind))
    assert {case.op for case in cases} == {"w4a4_gemm", "w4a4_gelu_quantize"}
    for case in cases:
        assert case.disagreement(EmulatedDevice(kind), CPU) == 0.0
    change = ("m / 2 * SCALED_ROWS", "0") if kind.block_scaled else ("i / 4 * SCALED_ROWS", "0")
    file = "multiply_mxf4.cuh" if kind.block_scaled else "multiply_int4.cuh"
    wrong = EmulatedDevice(kind, sources=mutated(tmp_path, file, *change))
    case = next(case for case in cases if case.precision == ("nvfp4" if kind.block_scaled else "int4"))
    assert case.disagreement(wrong, CPU) > 0
