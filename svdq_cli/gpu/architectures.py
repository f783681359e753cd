"""Which cards the kernels are compiled for, and which instruction each of them multiplies codes with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from svdq_cli.errors import EnvironmentLacksError


class CodeMma(IntEnum):
    """The instruction of the int4 product. The values are those of kernels/multiply_int4.cuh."""

    S4_K32 = 0  # m8n8k32: sm_75
    S4_K64 = 1  # m16n8k64: sm_80, 86, 89
    S8_K32 = 2  # m16n8k32 on unpacked codes: sm_80 and newer


@dataclass(frozen=True, slots=True)
class Architecture:
    """A compilation target."""

    target: str  # what NVRTC is told, such as "sm_90a"
    code_mma: CodeMma  # of the two that a card may have, the faster
    bfloat16: bool
    shared_kb: int  # of a multiprocessor: CUDA C++ Programming Guide, technical specifications per compute capability
    block_scaled: bool = False  # mxf4nvf4 mma
    least_nvrtc: tuple[int, int] = (12, 8)  # that knows the target: release notes of CUDA
    hopper_modes: bool = False  # kernels/experimental/hopper/hopper_*.cu


# Every kernel compiles for every one of these; tests/gpu holds it.
ARCHITECTURES = (
    Architecture("sm_75", CodeMma.S4_K32, bfloat16=False, shared_kb=64),
    Architecture("sm_80", CodeMma.S4_K64, bfloat16=True, shared_kb=164),
    Architecture("sm_86", CodeMma.S4_K64, bfloat16=True, shared_kb=100),
    Architecture("sm_89", CodeMma.S4_K64, bfloat16=True, shared_kb=100),
    Architecture("sm_90a", CodeMma.S8_K32, bfloat16=True, shared_kb=228, hopper_modes=True),
    Architecture("sm_100", CodeMma.S8_K32, bfloat16=True, shared_kb=228),
    Architecture("sm_110", CodeMma.S8_K32, bfloat16=True, shared_kb=228, least_nvrtc=(13, 0)),
    Architecture("sm_120a", CodeMma.S8_K32, bfloat16=True, shared_kb=100, block_scaled=True),
    Architecture(
        *("sm_121a", CodeMma.S8_K32), bfloat16=True, shared_kb=100, block_scaled=True, least_nvrtc=(12, 9)
    ),
)


def architecture(target: str) -> Architecture:
    return next(known for known in ARCHITECTURES if known.target == target)


def architecture_of(major: int, minor: int) -> Architecture:
    """The target for a card of this compute capability.

    A card between two known ones takes the code of the nearest older one of its generation (8.7 runs sm_86, 10.3 runs
    sm_100). Raises EnvironmentLacksError for a card that no target's code runs on.
    """
    fitting = [known for known in ARCHITECTURES if _runs_on(known.target, major, minor)]
    if not fitting:
        targets = ", ".join(known.target for known in ARCHITECTURES)
        raise EnvironmentLacksError(
            f"no kernel runs on compute capability {major}.{minor}",
            hint=f"kernels can be compiled for {targets}; use --backend reference",
            kind="no-kernel-for-gpu",
        )
    return fitting[-1]


def _runs_on(target: str, major: int, minor: int) -> bool:
    """Machine code runs within a major version on the same or a newer minor one; an `a` target on its own card only."""
    exact = target.endswith("a")
    number = int(target.removeprefix("sm_").removesuffix("a"))
    has = divmod(number, 10)
    return has == (major, minor) if exact else has[0] == major and has[1] <= minor
