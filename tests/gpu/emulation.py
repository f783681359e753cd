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
    descending: bool = False

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], threads: int, *arguments: Argument
    ) -> None:
        assert variant in variants_of(self.architecture), f"{variant.label} is not in gpu.compile_all's list"
        values = [_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        failure = _library(variant)(*grid, threads, int(self.descending), pointers)
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
def _library(variant: Variant):
    function = ctypes.CDLL(str(build(variant))).emulate
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


def build(variant: Variant) -> Path:
    """The library of one variant, built once for each state of the sources."""
    digest = hashlib.sha256(variant.label.encode())
    for path in (*sorted(EMULATOR.iterdir()), *kernel_files(".cu"), *kernel_files(".cuh")):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"svdq-emulated-kernels-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{variant.kernel}-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        # The emulator's folder comes first, so that its ptx.cuh is included instead of the kernels'
        words = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
        words += ["-Wno-unknown-pragmas", "-iquote", str(EMULATOR), "-iquote", str(staged_sources())]
        words += ["-I", str(EMULATOR)]
        words += [f"-D{name}={value}" for name, value in variant.defines]
        words += [f"-DKERNEL={variant.kernel}", f'-DSOURCE="{staged_sources() / variant.kernel}.cu"']
        partial = library.with_suffix(f".{os.getpid()}.partial")
        subprocess.run([*words, str(EMULATOR / "main.cpp"), "-o", str(partial)], check=True)
        os.replace(partial, library)
    return library


@functools.cache
def staged_sources() -> Path:
    """The kernels without what the emulator replaces: an include looks beside the including file first."""
    folder = Path(tempfile.mkdtemp(prefix="svdq-kernel-sources-"))
    for path in (*kernel_files(".cu"), *kernel_files(".cuh")):
        if not (EMULATOR / path.name).exists():
            shutil.copy(path, folder)
    return folder
