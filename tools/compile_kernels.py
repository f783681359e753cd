"""Every variant that the runtime may ask for, compiled without a GPU: `python -m tools.compile_kernels`.

Prints a row a target: how many variants, the most registers, and what is wrong with any of them. To see
another NVRTC than the installed one: `pip install --target FOLDER nvidia-cuda-nvrtc==13.0.88`, then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu import nvrtc, variants
from svdq_cli.gpu.architectures import ARCHITECTURES, Architecture, architecture
from svdq_cli.gpu.compile import Usage, Variant, compile_variant
from svdq_cli.records import Int4, NvFp4
from svdq_cli.runtime import ops

MOST_RANK = 512  # larger ones repeat the chunks of smaller ones
# A multiprocessor's 32-bit registers, and how many a thread's are rounded up to (all architectures here): CUDA C++
# Programming Guide, technical specifications, and Nsight Compute's occupancy calculator.
REGISTER_FILE, REGISTER_UNIT = 65536, 8
STATIC_SHARED_BYTES = 48 * 1024  # of a block, without opting in
RESERVED_SHARED_BYTES = 1024  # the driver's own of every block, from compute capability 8.0 on
# A block of each kernel must find this many of its kind on a multiprocessor; where MIN_BLOCKS says more, those.
LEAST_BLOCKS = {"reduce_hidden": 4, "w4a16_linear": 2, "hopper_reduce_hidden": 2}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a variant: its usage, or why it did not compile."""

    kind: Architecture
    variant: Variant
    usage: Usage | None
    faults: tuple[str, ...]


# ------------------------------------------------------------------------------------------ which variants there are


@functools.cache
def variants_of(kind: Architecture) -> tuple[Variant, ...]:
    """All that a launcher of this architecture may be asked for, each once."""
    dtypes = (torch.bfloat16, torch.float16) if kind.bfloat16 else (torch.float16,)
    found: list[Variant] = []
    for dtype in dtypes:
        found += _portable(dtype, kind)
        if kind.hopper_modes:
            found += _hopper(dtype)
    return tuple(dict.fromkeys(found))


def _portable(dtype: torch.dtype, kind: Architecture) -> Iterator[Variant]:
    yield ops.reduce_hidden.variant(dtype)
    yield ops.w4a16_linear.variant(dtype)
    for rank in range(0, MOST_RANK + 1, 16):
        yield ops.quantize_down.variant(dtype, NvFp4(), rank=rank)
        for unsigned in (False, True):
            yield ops.quantize_down.variant(dtype, Int4(), rank=rank, unsigned=unsigned)
    for block_m in (variants.SMALL_BLOCK_M, variants.BLOCK_M, variants.LARGE_BLOCK_M):
        large = block_m == variants.LARGE_BLOCK_M
        if not large or variants.has_large_blocks(NvFp4(), kind):
            yield ops.w4a4_gemm.variant(dtype, NvFp4(), kind, block_m=block_m)
            yield ops.w4a4_gelu_quantize.variant(dtype, NvFp4(), kind, block_m=block_m)
        if large and not variants.has_large_blocks(Int4(), kind):
            continue
        for unsigned in (False, True):
            yield ops.w4a4_gemm.variant(dtype, Int4(), kind, block_m=block_m, unsigned=unsigned)
            for following in (False, True):
                yield ops.w4a4_gelu_quantize.variant(
                    dtype, Int4(), kind, block_m=block_m, unsigned=unsigned, next_unsigned=following
                )


def _hopper(dtype: torch.dtype) -> Iterator[Variant]:
    for tokens in (hopper.TOKENS, hopper.SMALL_TOKENS):
        yield hopper.reduce_hidden_variant(dtype, tokens=tokens)
        for unsigned in (False, True):
            yield hopper.gelu_quantize_variant(dtype, tokens=tokens, next_unsigned=unsigned)
        for mode in HopperMode:
            yield hopper.gemm_variant(dtype, mode, tokens=tokens)
            signs = (False, True) if mode == HopperMode.EXACT else (False,)
            for rank, unsigned in product(range(0, MOST_RANK + 1, hopper.RANK_STEP), signs):
                yield hopper.quantize_down_variant(dtype, mode, tokens=tokens, rank=rank, unsigned=unsigned)


# ------------------------------------------------------------------------------------------ what is asked of each


def threads_of(variant: Variant) -> int:
    """Threads of a block, as the launch has them."""
    constants = dict(variant.defines)
    if variant.dynamic_shared:
        return hopper.THREADS
    if "WARPS" in constants:
        return variants.LANES * constants["WARPS"]
    return variants.gemm_threads(constants["BLOCK_M"])


def blocks_that_fit(variant: Variant, usage: Usage, kind: Architecture) -> int:
    """How many blocks share a multiprocessor, by registers and by shared memory."""
    registers = -(-usage.registers // REGISTER_UNIT) * REGISTER_UNIT * threads_of(variant)
    shared = usage.shared_bytes + variant.dynamic_shared + RESERVED_SHARED_BYTES
    return min(REGISTER_FILE // registers, kind.shared_kb * 1024 // shared)


def faults_of(variant: Variant, usage: Usage, kind: Architecture) -> Iterator[str]:
    """What should not be: numbers kept in memory for want of registers, products that wait for each other, a block that
    does not fit as often as it is meant to."""
    if usage.spill_bytes:
        yield f"spills {usage.spill_bytes} bytes"
    if usage.stack_bytes:
        yield f"{usage.stack_bytes} bytes of stack"
    if usage.serialized:
        yield "serialized products"
    if usage.shared_bytes > STATIC_SHARED_BYTES:
        yield f"{usage.shared_bytes} bytes of static shared memory"
    least = max(LEAST_BLOCKS.get(variant.kernel, 1), dict(variant.defines).get("MIN_BLOCKS", 1))
    if (fitting := blocks_that_fit(variant, usage, kind)) < least:
        shared = usage.shared_bytes + variant.dynamic_shared
        yield f"{fitting} blocks of {least} fit: {usage.registers} registers, {shared} bytes of shared memory"


# ------------------------------------------------------------------------------------------ the command


def compile_all(
    kind: Architecture, chosen: Iterable[Variant], *, cache: Path | None = None, threads: int = 1
) -> list[Compiled]:
    """What becomes of each variant on an architecture. Raises EnvironmentLacksError without NVRTC."""

    def compiled(variant: Variant) -> Compiled:
        try:
            usage = compile_variant(variant, kind.target, cache=cache).usage
        except nvrtc.CompileError as error:
            return Compiled(kind, variant, None, (f"does not compile: {error}",))
        return Compiled(kind, variant, usage, tuple(faults_of(variant, usage, kind)))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(compiled, chosen))


HEADING = "target   variants  at fault  spilled bytes  most registers"


def row_of(kind: Architecture, found: Sequence[Compiled]) -> str:
    """A target's line under HEADING. Spilled bytes are those of all variants, stores and loads."""
    usages = [(item.usage.registers, item.variant.kernel) for item in found if item.usage]
    most, where = max(usages, default=(0, "-"))
    spilled = sum(item.usage.spill_bytes for item in found if item.usage)
    faulty = sum(bool(item.faults) for item in found)
    return f"{kind.target:8} {len(found):8}  {faulty:8}  {spilled:13}  {most} ({where})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", choices=[kind.target for kind in ARCHITECTURES])
    parser.add_argument("--kernel", help="this one only")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    kinds = [architecture(target) for target in asked.target] if asked.target else ARCHITECTURES
    try:
        print(f"NVRTC {'.'.join(map(str, nvrtc.version()))}\n{HEADING}", flush=True)
    except EnvironmentLacksError as lack:
        print(f"{lack.message}. {lack.hint}", file=sys.stderr)
        return lack.code
    faulty: list[Compiled] = []
    for kind in kinds:
        chosen = [variant for variant in variants_of(kind) if asked.kernel in (None, variant.kernel)]
        found = compile_all(kind, chosen, threads=asked.threads)
        print(row_of(kind, found), flush=True)
        faulty += [item for item in found if item.faults]
    for item in faulty:
        print(f"{item.kind.target} {item.variant.label}: {', '.join(item.faults)}")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
