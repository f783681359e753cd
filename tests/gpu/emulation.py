"""Runs the kernels' own source on the CPU: a host build in which the PTX wrappers are lane-exact functions.

`EmulatedDevice` is a launcher like a GPU's, so the code that chooses grids and allocates results is tested with it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from svdq_cli.gpu.architectures import Architecture, architecture
from svdq_cli.gpu.compile import Variant, kernel_files
from svdq_cli.gpu.launcher import Argument
from tools.compile_kernels import variants_of

EMULATOR = Path(__file__).parent / "emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

HOPPER = architecture("sm_90a")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler (g++, clang++ or $CXX)")


@dataclass(frozen=True, slots=True)
class EmulatedDevice:
    """Runs blocks one after the other. `descending`: threads run from the last to the first, which shows a missing
    barrier; nothing else may change with it."""

    architecture: Architecture = HOPPER
    multiprocessors: int = 4
    large_blocks: bool = False
    descending: bool = False
    lazy_warp: int | None = None  # runs only when no other warp can
    sources: Path | None = None  # the kernels that are run; those of the repository without one

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], threads: int, *arguments: Argument
    ) -> None:
        assert variant in variants_of(self.architecture), f"{variant.label} is not in gpu.compile_all's list"
        values = [_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        order = int(self.descending) if self.lazy_warp is None else 2 + self.lazy_warp
        failure = _library(variant, self.sources)(*grid, threads, order, pointers)
        if failure:
            raise AssertionError(f"{variant.label}: {failure.decode()}")


def _c_value(argument: Argument) -> ctypes._SimpleCData:
    match argument:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            assert argument.is_contiguous()
            return ctypes.c_void_p(argument.data_ptr())
        case int():
            return ctypes.c_int32(argument)
        case float():
            return ctypes.c_float(argument)


@functools.cache
def _library(variant: Variant, sources: Path | None = None):
    function = ctypes.CDLL(str(build(variant, sources))).emulate
    function.restype = ctypes.c_char_p
    function.argtypes = [
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return function


def build(variant: Variant, sources: Path | None = None) -> Path:
    """The library of one variant, built once for each state of the sources: those of the repository, or a folder of
    `mutated` ones."""
    digest = hashlib.sha256(variant.label.encode())
    kernels = sorted(sources.iterdir()) if sources else (*kernel_files(".cu"), *kernel_files(".cuh"))
    for path in (*sorted(EMULATOR.iterdir()), *kernels):
        digest.update(path.read_bytes())
    sources = sources or staged_sources()
    folder = Path(tempfile.gettempdir()) / f"svdq-emulated-kernels-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{variant.kernel}-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        # The emulator's folder comes first, so that its ptx.cuh is included instead of the kernels'
        words = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
        words += ["-Wno-unknown-pragmas", "-iquote", str(EMULATOR), "-iquote", str(sources)]
        words += ["-I", str(EMULATOR)]
        words += [f"-D{name}={value}" for name, value in variant.defines]
        words += [f"-DKERNEL={variant.kernel}", f'-DSOURCE="{sources / variant.kernel}.cu"']
        partial = library.with_suffix(f".{os.getpid()}.partial")
        subprocess.run([*words, str(EMULATOR / "main.cpp"), "-o", str(partial)], check=True)
        os.replace(partial, library)
    return library


def mutated(folder: Path, file: str, text: str, other: str) -> Path:
    """The kernels' sources in `folder`, with one place of one file changed."""
    for path in staged_sources().iterdir():
        shutil.copy(path, folder)
    before = (folder / file).read_text()
    assert before.count(text) == 1, f"{file} has {before.count(text)} places like {text!r}"
    (folder / file).write_text(before.replace(text, other))
    return folder


@functools.cache
def staged_sources() -> Path:
    """The kernels without what the emulator replaces: an include looks beside the including file first."""
    folder = Path(tempfile.mkdtemp(prefix="svdq-kernel-sources-"))
    for path in (*kernel_files(".cu"), *kernel_files(".cuh")):
        if not (EMULATOR / path.name).exists():
            shutil.copy(path, folder)
    return folder
