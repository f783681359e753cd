"""Machine code of a kernel as instructions, and its main loop counted: needs NVIDIA's disassembler, no GPU."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import EnvironmentLacksError

_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;")
_BRANCH = re.compile(r"(@!?U?P\d+ +)?BRA\b.*`\((\.L\w+)\)")
# IMMA.16864.S4.S4, HMMA.16816.F32.BF16, OMMA.SF.16864.F32.E2M1, QGMMA.64x192x32.F32.E4M3: rows, columns, depth
_MMA = re.compile(r"\b([A-Z]G?MMA)(?:\.SF|\.SP)*\.(?:(\d+)x(\d+)x(\d+)|(8|16)(8)(\d+))\b(\S*)")
_WAIT = re.compile(r"GMMA\.64x8x\S+ RZ,")  # how ptxas writes a wait for products: one that keeps no result
_COPY = "LDGSTS"


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of a kernel, by the places of its first and last instruction."""

    instructions: tuple[str, ...]
    issued: int  # by a warp in one turn, on its usual way

    def count(self, *names: str) -> int:
        """Instructions whose name is one of these, modifiers left out."""
        return sum(name_of(instruction) in names for instruction in self.instructions)

    @property
    def products(self) -> Iterator[tuple[str, int]]:
        """Tensor-core instructions: the operand's type as the disassembler writes it, and multiply-adds of the whole
        instruction, of a warp or a warpgroup."""
        return _products(self.instructions)


@functools.cache
def disassembler() -> str:
    """nvdisasm, of the PATH or of its wheel. Raises EnvironmentLacksError without one."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*/bin/nvdisasm*")):
            return str(path)
    raise EnvironmentLacksError(
        "no nvdisasm, NVIDIA's disassembler, is here",
        hint="pip install nvidia-cuda-nvdisasm",
    )


def main_loop(cubin: Path) -> Loop:
    """The loop with the most multiply-adds of its own on tensor cores. ValueError where none has any."""
    code = subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return main_loop_of(code.stdout)


def main_loop_of(listing: str) -> Loop:
    """`main_loop` of a listing of nvdisasm."""
    instructions, labels = _parse(listing)
    loops = list(dict.fromkeys(_loops(instructions, labels)))

    def work(loop: tuple[int, int]) -> int:
        """Multiply-adds of a loop, without those of the loops inside it."""
        inner = [other for other in loops if other != loop and loop[0] <= other[0] and other[1] <= loop[1]]
        own = (
            instructions[place]
            for place in range(loop[0], loop[1] + 1)
            if not any(first <= place <= last for first, last in inner)
        )
        return sum(count for _, count in _products(own))

    start, end = max(loops, key=work, default=(0, -1))
    if not work((start, end)):
        raise ValueError("no loop of this kernel has tensor-core instructions")
    return Loop(tuple(instructions[start : end + 1]), _issued(instructions, labels, start, end))


def name_of(instruction: str) -> str:
    """FFMA of "@!P0 FFMA.FTZ R1, R2, R3, R4"."""
    words = instruction.split()
    return (words[1] if words[0].startswith("@") else words[0]).split(".")[0]


def _products(instructions: Iterable[str]) -> Iterator[tuple[str, int]]:
    for instruction in instructions:
        if (found := _MMA.search(instruction)) and not _WAIT.search(instruction):
            unit, *sizes, modifiers = found.groups()
            m, n, k = (int(size) for size in sizes if size)
            yield _operand_type(unit, modifiers), m * n * k


def _operand_type(unit: str, modifiers: str) -> str:
    match unit:
        case "IMMA":
            return "int4" if re.search(r"[SU]4", modifiers) else "int8"
        case "OMMA":
            return "fp4"
        case "QGMMA" | "QMMA":
            return "fp8"
        case "IGMMA":
            return "int8"
    return "16 bit"


def _parse(listing: str) -> tuple[list[str], dict[str, int]]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            instructions.append(found[1])
    return instructions, labels


def _loops(instructions: Sequence[str], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """First and last place of every loop: branches back."""
    for place, instruction in enumerate(instructions):
        if (branch := _BRANCH.match(instruction)) and labels[branch[2]] <= place:
            yield labels[branch[2]], place


def _issued(instructions: Sequence[str], labels: dict[str, int], start: int, end: int) -> int:
    """The shortest way from `start` to `end`, of those with the most copies and the most multiply-adds: what a warp
    does that finds its operands there. Guarded instructions count, as they are issued; loops inside, which wait, count
    once."""
    # From a place to the end: copies, multiply-adds, and instructions below 0
    best: dict[int, tuple[int, int, int]] = {end: (0, 0, -1)}
    for place in range(end - 1, start - 1, -1):
        branch = _BRANCH.match(instructions[place])
        ways = [place + 1] if branch is None or branch[1] else []
        if branch is not None and labels[branch[2]] > place:
            ways.append(labels[branch[2]])
        reached = [best[way] for way in ways if way in best]
        if reached:
            copies, work, below = max(reached)
            copies += name_of(instructions[place]) == _COPY
            work += sum(count for _, count in _products([instructions[place]]))
            best[place] = (copies, work, below - 1)
    return -best[start][2]
