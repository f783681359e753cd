"""The kernels' main loops, counted in machine code without a GPU: `make kernel-report`.

A share of the roof is the most that counting allows, never a measurement: a loop takes at least its instructions in
issue slots, its float32 instructions in the float32 units, and its products in the tensor cores. "Predicted" counts
instructions at `variants.ISSUE_SHARE` a cycle. Kernels have the rows of a block in their name, Hopper's own the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu import nvrtc, variants
from svdq_cli.gpu.architectures import architecture
from svdq_cli.gpu.compile import Usage, Variant, compile_variant
from svdq_cli.records import Int4, NvFp4
from svdq_cli.runtime import ops
from tools.sass import Loop, disassembler, main_loop

SCHEDULERS = 4  # of a multiprocessor
FLOAT = ("FFMA", "FMUL", "FADD")


@dataclass(frozen=True, slots=True)
class Card:
    """Of a scheduler's share of a multiprocessor: dense multiply-adds a cycle by operand type, with sums in float32 or
    int32, and float32 lanes. From NVIDIA's architecture papers and data sheets: tera-operations over multiprocessors
    and boost clock."""

    name: str
    target: str
    multiply_adds: dict[str, int]
    float_lanes: int


CARDS = (
    Card("RTX 3090", "sm_86", {"int4": 512, "int8": 256, "16 bit": 64}, 32),
    Card("RTX 4090", "sm_89", {"int4": 512, "int8": 256, "16 bit": 64}, 32),
    Card("RTX 5090", "sm_120a", {"int8": 256, "fp4": 512, "16 bit": 64}, 32),
    Card("A100", "sm_80", {"int4": 1024, "int8": 512, "16 bit": 256}, 16),
    Card("H200", "sm_90a", {"int8": 1024, "fp8": 1024, "16 bit": 512}, 32),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel's main loop on one card."""

    card: Card
    kernel: str
    usage: Usage
    shared_bytes: int
    loop: Loop
    copied_bytes: int | None  # from L2 for one turn of a block; None where it is not the GEMM's ring
    warps: int  # of a block

    @property
    def tensor_cycles(self) -> float:
        """Of a turn of one warp; a warpgroup's products keep the tensor cores of all four schedulers busy."""
        return sum(
            count / self.card.multiply_adds[kind] / (SCHEDULERS if count > 64 * 64 * 8 else 1)
            for kind, count in self.loop.products
        )

    @property
    def float_cycles(self) -> float:
        return self.loop.count(*FLOAT) * 32 / self.card.float_lanes

    @property
    def predicted_cycles(self) -> float:
        """Of a multiprocessor for a turn of one block: the most of what its tensor cores and its float32 units take,
        and its instructions at as many a cycle as have been seen."""
        issue = self.loop.issued / variants.ISSUE_SHARE
        return max(self.tensor_cycles, self.float_cycles, issue) * self.warps / SCHEDULERS

    @property
    def predicted_share(self) -> float:
        """Of the tensor cores' time."""
        return self.tensor_cycles * self.warps / SCHEDULERS / self.predicted_cycles

    @property
    def most_share(self) -> float:
        """Of the tensor cores' time, if nothing but counting limits it."""
        return self.tensor_cycles / max(self.tensor_cycles, self.loop.issued, self.float_cycles)

    @property
    def bytes_a_cycle(self) -> float | None:
        """From L2 for a multiprocessor, at that share."""
        if self.copied_bytes is None:
            return None
        cycles = self.tensor_cycles / self.most_share * self.warps / SCHEDULERS
        return self.copied_bytes / cycles


def rows(*, cache: Path | None = None) -> Iterator[Row]:
    """Compiles and counts. Raises EnvironmentLacksError without NVRTC or nvdisasm."""
    for card in CARDS:
        kind = architecture(card.target)
        for precision in (Int4(), NvFp4()):
            for op, name in ((ops.w4a4_gemm, "w4a4_gemm"), (ops.w4a4_gelu_quantize, "w4a4_gelu_quantize")):
                for block_m in (variants.BLOCK_M, variants.LARGE_BLOCK_M):
                    if block_m == variants.BLOCK_M or variants.has_large_blocks(precision, kind):
                        variant = op.variant(torch.bfloat16, precision, kind, block_m=block_m)
                        yield _row(card, f"{name} {precision.name} {block_m}", variant, cache)
        if kind.hopper_modes:
            for mode in HopperMode:
                for tokens in (hopper.TOKENS, hopper.SMALL_TOKENS):
                    variant = hopper.gemm_variant(torch.bfloat16, mode, tokens=tokens)
                    yield _row(card, f"hopper_gemm {mode.label} {tokens}", variant, cache)


def _row(card: Card, kernel: str, variant: Variant, cache: Path | None) -> Row:
    cubin = compile_variant(variant, card.target, cache=cache)
    constants = dict(variant.defines)
    shared = cubin.usage.shared_bytes + variant.dynamic_shared
    copied = None
    if "BLOCK_M" in constants:
        copied = cubin.usage.shared_bytes // constants["STAGES"]
    warps = (
        hopper.THREADS // 32 if variant.dynamic_shared else variants.gemm_threads(constants["BLOCK_M"]) // 32
    )
    return Row(card, kernel, cubin.usage, shared, main_loop(cubin.path), copied, warps)


HEADING = (
    "| card | kernel | instructions a step | tensor cycles | instructions a tensor cycle | registers | spilled bytes | "
    "shared memory | L2 bytes a cycle | share of the roof, at most | predicted |\n" + "| --- " * 11 + "|"
)


def line_of(row: Row) -> str:
    """A row of the table under HEADING. Markdown."""
    per_cycle = "-" if row.bytes_a_cycle is None else f"{row.bytes_a_cycle:.1f}"
    return (
        f"| {row.card.name} | {row.kernel} | {row.loop.issued} | {row.tensor_cycles:.0f} | "
        f"{row.loop.issued / row.tensor_cycles:.2f} | {row.usage.registers} | {row.usage.spill_bytes} | "
        f"{row.shared_bytes:,} | {per_cycle} | {row.most_share:.2f} | "
        f"{row.predicted_share:.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        disassembler()
        print(f"NVRTC {'.'.join(map(str, nvrtc.version()))}. Counted, not measured.\n\n{HEADING}", flush=True)
        spilled = 0
        for row in rows():
            print(line_of(row), flush=True)
            spilled += row.usage.spill_bytes
    except EnvironmentLacksError as lack:
        print(f"{lack.message}. {lack.hint}", file=sys.stderr)
        return lack.code
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(main())
