"""The instruction sets that `kernels/cpu/` has an inner tile for, and which of them this processor has."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import UsageError

CHOICE = "SVDQ_CPU_ISA"  # the environment's word for another instruction set than the best one
_SYSCTL_SECONDS = 10
_PF_AVX2_INSTRUCTIONS_AVAILABLE = 40  # of winnt.h, as the next two
_PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE = 43
_PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE = 66


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One way to compile the engine."""

    name: str
    vector: str  # the header of kernels/cpu/ that speaks it
    flags: tuple[str, ...]  # as GCC and Clang spell them
    needs: frozenset[str]  # features, as Linux' /proc/cpuinfo spells them


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_HAS_AVX2 = frozenset({"avx2", "fma", "f16c"})
_HAS_AVX512 = _HAS_AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

# The best first. The last one runs everywhere.
INSTRUCTION_SETS = (
    InstructionSet(
        "avx512-bf16", "vector_avx512.h", (*_AVX512, "-mavx512bf16"), _HAS_AVX512 | {"avx512_bf16"}
    ),
    InstructionSet("avx512-vnni", "vector_avx512.h", _AVX512, _HAS_AVX512),
    InstructionSet("avx-vnni", "vector_avx2.h", (*_AVX2, "-mavxvnni"), _HAS_AVX2 | {"avx_vnni"}),
    InstructionSet("avx2", "vector_avx2.h", _AVX2, _HAS_AVX2),
    InstructionSet(
        "neon-i8mm", "vector_neon.h", ("-march=armv8.2-a+dotprod+i8mm",), frozenset({"asimddp", "i8mm"})
    ),
    InstructionSet("neon-dotprod", "vector_neon.h", ("-march=armv8.2-a+dotprod",), frozenset({"asimddp"})),
    InstructionSet("scalar", "vector_scalar.h", (), frozenset()),
)
BY_NAME = {each.name: each for each in INSTRUCTION_SETS}


def best_here() -> InstructionSet:
    """What the processor runs fastest, or what $SVDQ_CPU_ISA names. Raises UsageError for a name that is none."""
    if wanted := os.environ.get(CHOICE):
        if wanted not in BY_NAME:
            raise UsageError(f"{CHOICE}={wanted}: no such instruction set", hint=f"use {', '.join(BY_NAME)}")
        return BY_NAME[wanted]
    return best_of(features_here())


def best_of(features: Collection[str]) -> InstructionSet:
    """The first instruction set that a processor with these features has."""
    return next(each for each in INSTRUCTION_SETS if each.needs <= set(features))


def all_here() -> tuple[InstructionSet, ...]:
    """Every instruction set that this processor has, the best one first."""
    return tuple(each for each in INSTRUCTION_SETS if each.needs <= features_here())


@functools.cache
def features_here() -> frozenset[str]:
    """This processor's features as Linux spells them. Fewer where the system does not tell."""
    if sys.platform == "linux":
        return _linux_features(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    if sys.platform == "darwin":
        return _mac_features()
    return _windows_features()


def _linux_features(cpuinfo: str) -> frozenset[str]:
    """CPU features of the first processor on Linux: "flags" on x86, "Features" on Arm."""
    for line in cpuinfo.splitlines():
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()


def _mac_features() -> frozenset[str]:
    if platform.machine() == "arm64":
        asked = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM"}  # the M1 has the first, the M2 both
        return frozenset(each for each, name in asked.items() if _sysctl(f"hw.optional.arm.{name}") == "1")
    words = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}".lower().split()
    renamed = {"avx512vnni": "avx512_vnni"}
    return frozenset(renamed.get(word, word) for word in words)


def _sysctl(name: str) -> str:
    try:
        found = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name],
            capture_output=True,
            text=True,
            timeout=_SYSCTL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _windows_features() -> frozenset[str]:
    """Windows tells of AVX2 (every processor with it has FMA and F16C), of Arm's dot product and, from Windows 11 24H2
    on, of Arm's products of bytes, and of no more."""
    import ctypes

    present = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    if present is None:
        return frozenset()
    told = {
        _PF_AVX2_INSTRUCTIONS_AVAILABLE: _HAS_AVX2,
        _PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE: {"asimddp"},
        _PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE: {"i8mm"},
    }
    return frozenset[str]().union(
        *(names for code, names in told.items() if present.IsProcessorFeaturePresent(code))
    )
