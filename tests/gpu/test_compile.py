"""Every kernel compiles for every card it claims, without a card: no spills, registers bounded, and the right
instruction inside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu import nvrtc, variants
from svdq_cli.gpu.architectures import ARCHITECTURES, Architecture, CodeMma, architecture, architecture_of
from svdq_cli.gpu.compile import (
    Usage,
    Variant,
    compile_variant,
    kernel_files,
    read_headers,
    read_source,
    usage_of,
)
from svdq_cli.records import Int4, NvFp4
from svdq_cli.runtime import ops
from svdq_cli.storage.resources import data_root
from tools.compile_kernels import Compiled, blocks_that_fit, compile_all, faults_of, variants_of


def _nvrtc_is_here() -> bool:
    try:
        nvrtc.version()
    except EnvironmentLacksError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not _nvrtc_is_here(), reason='needs NVRTC: pip install "svdq[cuda13]"')

HOPPER = "sm_90a"


def representative(kind: Architecture) -> Iterator[Variant]:
    """Each kernel in its common variants; in its largest ones too, but where the code is that of sm_80."""
    yield from portable(kind)
    if kind.target == HOPPER:
        yield from hopper_variants()


def hopper_variants() -> Iterator[Variant]:
    for tokens in (hopper.TOKENS, hopper.SMALL_TOKENS):
        for mode in HopperMode:
            yield hopper.gemm_variant(torch.bfloat16, mode, tokens=tokens)
        yield hopper.gelu_quantize_variant(torch.bfloat16, tokens=tokens)
    for mode in HopperMode:
        yield hopper.quantize_down_variant(torch.bfloat16, mode, tokens=hopper.TOKENS, rank=64)
        yield hopper.quantize_down_variant(torch.bfloat16, mode, tokens=hopper.TOKENS, rank=32)
    yield hopper.quantize_down_variant(
        torch.float16, HopperMode.EXACT, tokens=hopper.TOKENS, rank=32, unsigned=True
    )
    yield hopper.gemm_variant(torch.float16, HopperMode.EXACT, tokens=hopper.TOKENS)
    yield hopper.reduce_hidden_variant(torch.bfloat16, tokens=hopper.TOKENS)


def portable(kind: Architecture) -> Iterator[Variant]:
    dtype = torch.bfloat16 if kind.bfloat16 else torch.float16
    large, small = variants.BLOCK_M, variants.SMALL_BLOCK_M
    yield ops.quantize_down.variant(dtype, Int4(), rank=32)
    yield ops.reduce_hidden.variant(dtype)
    yield ops.w4a16_linear.variant(dtype)
    yield ops.w4a4_gemm.variant(dtype, Int4(), kind, block_m=large)
    yield ops.w4a4_gemm.variant(dtype, NvFp4(), kind, block_m=large)
    yield ops.w4a4_gelu_quantize.variant(dtype, Int4(), kind, block_m=large, next_unsigned=True)
    for precision in (Int4(), NvFp4()):
        if variants.has_large_blocks(precision, kind):
            yield ops.w4a4_gemm.variant(dtype, precision, kind, block_m=variants.LARGE_BLOCK_M)
            yield ops.w4a4_gelu_quantize.variant(dtype, precision, kind, block_m=variants.LARGE_BLOCK_M)
    if kind.target in ("sm_86", "sm_89", "sm_100", "sm_110", "sm_121a"):
        return
    yield ops.quantize_down.variant(dtype, Int4(), rank=64, unsigned=True)
    yield ops.quantize_down.variant(dtype, NvFp4(), rank=64)
    yield ops.w4a4_gelu_quantize.variant(dtype, NvFp4(), kind, block_m=large)
    yield ops.w4a4_gemm.variant(torch.float16, Int4(), kind, block_m=large, unsigned=True)
    if kind.bfloat16:
        yield ops.w4a4_gemm.variant(torch.float16, Int4(), kind, block_m=small)
    if kind.code_mma == CodeMma.S4_K64:
        yield ops.w4a4_gemm.variant(dtype, Int4(), replace(kind, code_mma=CodeMma.S8_K32), block_m=large)
    if kind.block_scaled:
        yield ops.w4a4_gemm.variant(dtype, NvFp4(), replace(kind, block_scaled=False), block_m=large)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Compiled]]:
    """By target, into an empty cache, two at a time."""
    cache = tmp_path_factory.mktemp("cubins")
    return {
        kind.target: compile_all(kind, representative(kind), cache=cache, threads=2) for kind in ARCHITECTURES
    }


@needs_nvrtc
@pytest.mark.parametrize("kind", ARCHITECTURES, ids=lambda kind: kind.target)
def test_every_kernel_compiles_without_spills_and_fits_its_blocks(
    kind: Architecture, compiled: dict[str, list[Compiled]]
):
    assert {item.variant.kernel for item in compiled[kind.target]} == kernels_for(kind)
    assert not [(item.variant.label, item.faults) for item in compiled[kind.target] if item.faults]


def kernels_for(kind: Architecture) -> set[str]:
    """The names of kernels/*.cu that are for an architecture."""
    names = {path.stem for path in kernel_files(".cu")}
    return {name for name in names if kind.hopper_modes or not name.startswith("hopper_")}


@pytest.mark.parametrize("kind", ARCHITECTURES, ids=lambda kind: kind.target)
def test_the_list_of_all_variants_has_every_kernel_and_none_twice(kind: Architecture):
    listed = variants_of(kind)
    assert {variant.kernel for variant in listed} == kernels_for(kind)
    assert len(set(listed)) == len(listed)


@needs_nvrtc
@pytest.mark.parametrize("kind", ARCHITECTURES, ids=lambda kind: kind.target)
def test_two_blocks_share_a_multiprocessor_where_that_is_asked_for(
    kind: Architecture, compiled: dict[str, list[Compiled]]
):
    asked = [item for item in compiled[kind.target] if dict(item.variant.defines).get("MIN_BLOCKS") == 2]
    assert bool(asked) == (kind.target in variants.TWO_BLOCKS_TARGETS)
    for item in asked:
        assert item.usage
        assert blocks_that_fit(item.variant, item.usage, kind) >= 2, item.variant.label


@pytest.mark.parametrize(
    ("usage", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"stack_bytes": 8}, "8 bytes of stack"),
        ({"serialized": True}, "serialized products"),
        ({"registers": 129}, "1 blocks of 2 fit: 129 registers, 26112 bytes of shared memory"),
        ({"shared_bytes": 34816}, "1 blocks of 2 fit: 128 registers, 34816 bytes of shared memory"),
    ],
)
def test_what_a_variant_should_not_need_is_named(usage: dict[str, int], fault: str):
    kind = architecture("sm_75")
    variant = ops.w4a4_gemm.variant(torch.float16, Int4(), kind, block_m=variants.BLOCK_M)
    sound = Usage(registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=26112, serialized=False)
    assert not list(faults_of(variant, sound, kind))
    assert list(faults_of(variant, replace(sound, **usage), kind)) == [fault]


def test_the_assemblers_warning_of_serialized_products_is_seen():
    log = (
        "ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non "
        "wgmma instructions defining input registers of a wgmma between start and end of the pipeline stage\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    assert usage_of(log) == Usage(
        registers=168, spill_bytes=0, stack_bytes=0, shared_bytes=0, serialized=True
    )
    assert not usage_of(log.partition("\n")[2]).serialized


@needs_nvrtc
def test_a_compiled_kernel_comes_from_the_cache_until_its_constants_change(tmp_path: Path):
    first = compile_variant(ops.reduce_hidden.variant(torch.float16), "sm_80", cache=tmp_path)
    written = first.path.stat().st_mtime_ns
    assert compile_variant(ops.reduce_hidden.variant(torch.float16), "sm_80", cache=tmp_path) == first
    assert first.path.stat().st_mtime_ns == written
    others = {
        compile_variant(ops.reduce_hidden.variant(torch.bfloat16), "sm_80", cache=tmp_path).path,
        compile_variant(ops.reduce_hidden.variant(torch.float16), "sm_86", cache=tmp_path).path,
    }
    assert len(others | {first.path}) == 3
    assert first.path.read_bytes()[:4] == b"\x7fELF"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".cubin"] * 3 + [".json"] * 3


@needs_nvrtc
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nvrtcs_second_library_is_loaded_with_the_first():
    """NVRTC 13.0's wheel does not find it by itself, and says so only when it compiles."""
    look = "from svdq_cli.gpu import nvrtc; nvrtc.version(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout
    assert "libnvrtc.so" in maps
    assert "libnvrtc-builtins.so" in maps


@needs_nvrtc
def test_what_does_not_compile_shows_the_compilers_words():
    with pytest.raises(nvrtc.CompileError, match="undefined_name"):
        nvrtc.compile_source(
            "int x = undefined_name;", name="x.cu", headers={}, options=["--gpu-architecture=sm_80"]
        )


@needs_nvrtc
def test_the_block_scaled_product_is_refused_where_the_instruction_is_not():
    variant = ops.w4a4_gemm.variant(torch.bfloat16, NvFp4(), architecture("sm_120a"), block_m=128)
    with pytest.raises(nvrtc.CompileError, match="compile for sm_120a"):
        compile_variant(variant, "sm_90a", cache=Path("unused"))


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_110"),
        ((12, 0), "sm_120a"),
        ((12, 1), "sm_121a"),
    ],
)
def test_a_card_gets_the_newest_code_that_runs_on_it(capability: tuple[int, int], target: str):
    assert architecture_of(*capability) == architecture(target)


@pytest.mark.parametrize("capability", [(7, 0), (12, 2), (13, 0)])
def test_a_card_that_no_code_runs_on_is_refused(capability: tuple[int, int]):
    with pytest.raises(EnvironmentLacksError, match=r"compute capability \d+\.\d"):
        architecture_of(*capability)


def test_a_card_that_is_newer_than_nvrtc_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    nvrtc.require_version(architecture("sm_120a").least_nvrtc, "sm_120a")
    with pytest.raises(EnvironmentLacksError, match=r"NVRTC 12\.8 does not know sm_110: 13\.0 or newer"):
        nvrtc.require_version(architecture("sm_110").least_nvrtc, "sm_110")


def test_sources_need_no_headers_but_their_own():
    """NVRTC wheels bring no CUDA headers."""
    own = set(read_headers())
    kernels = [path.stem for path in kernel_files(".cu")]
    for text in (*map(read_source, kernels), *read_headers().values()):
        included = {line.split('"')[1] for line in text.splitlines() if line.startswith("#include")}
        assert included <= own


def test_inline_ptx_stands_in_three_files():
    for name, text in read_headers().items():
        assert ("asm" in text) == (name in ("ptx.cuh", "hopper.cuh", "wgmma.cuh"))
    assert not any("asm(" in read_source(path.stem) for path in data_root("kernels").glob("*.cu"))


@pytest.mark.parametrize("rank", range(0, 513, 16))
def test_rank_chunks_cover_every_rank(rank: int):
    chunk = variants.rank_chunk(rank)
    assert chunk % 16 == 0
    assert chunk <= variants.MOST_RANK_CHUNK
    if rank:
        chunks = -(-rank // chunk)
        assert chunk * (chunks - 1) < rank <= chunk * chunks
