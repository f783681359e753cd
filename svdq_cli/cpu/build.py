"""The engine as a shared library, from svdq's cache or compiled now by the C++ compiler that is here."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.cpu.instruction_sets import InstructionSet
from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.storage.atomic import cache_errors, whole_file
from svdq_cli.storage.resources import cache_folder, data_root

SOURCE = "engine.cpp"
INSTALL_HINT = 'install a C++ compiler (g++ or clang++), or pip install "svdq[cpu]"'
_COMPILE_SECONDS = 600
# No contraction of a * b + c into one rounding: where the engine wants that, it says so, and so does its definition.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-w", "-shared")
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that understands GCC's options."""

    command: tuple[str, ...]
    identity: str  # changes when another version takes its place

    @property
    def name(self) -> str:
        return "zig c++ (PyPI)" if "ziglang" in self.command else " ".join(self.command)


@functools.cache
def find_compiler() -> Compiler | None:
    """$CXX, the system's, or the one that PyPI's `ziglang` brings."""
    for command in _candidates():
        program = shutil.which(command[0])
        if program is not None:
            facts = os.stat(os.path.realpath(program))
            return Compiler(command, f"{program} {facts.st_size} {facts.st_mtime_ns}")
    if importlib.util.find_spec("ziglang") is not None:
        from importlib.metadata import version

        return Compiler((sys.executable, "-m", "ziglang", "c++"), f"ziglang {version('ziglang')}")
    return None


def _candidates() -> Iterator[tuple[str, ...]]:
    if chosen := os.environ.get("CXX"):
        yield tuple(shlex.split(chosen))
    yield from ((name,) for name in ("g++", "clang++", "c++"))


def built_library(isa: InstructionSet, *, cache: Path | None = None) -> Path:
    """The engine for an instruction set. `cache` defaults to `cache_folder() / "cpu"`.

    Raises EnvironmentLacksError where it is neither in the cache nor can be compiled.
    """
    compiler = find_compiler()
    folder = cache or cache_folder() / "cpu"
    flags = (*_FLAGS, *_platform_flags(), *isa.flags, f'-DSVDQ_VECTOR="{isa.vector}"')
    if compiler is None:
        raise EnvironmentLacksError(
            "no C++ compiler was found for svdq's CPU engine", hint=INSTALL_HINT, kind="no-compiler"
        )
    path = folder / f"engine-{isa.name}-{_key((*flags, *_libraries(compiler)), compiler)}{_SUFFIX}"
    if not path.is_file():
        with cache_errors(folder, "svdq's CPU engine"):
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, flags, path)
    return path


@functools.cache
def sources() -> Mapping[str, str]:
    """Everything that is compiled, by file name."""
    folder = data_root("kernels") / "cpu"
    files = sorted((*folder.glob("*.h"), folder / SOURCE))
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def _platform_flags() -> tuple[str, ...]:
    return () if sys.platform == "win32" else ("-fPIC", "-pthread")


def _libraries(compiler: Compiler) -> tuple[str, ...]:
    """`gcc` and `clang`, which `CXX` may name, compile C++ and leave its library out; `g++` and `clang++` take it twice
    without harm."""
    return ("-lstdc++",) if sys.platform == "linux" and "ziglang" not in compiler.command else ()


def _key(flags: tuple[str, ...], compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for text in (
        *(part for pair in sources().items() for part in pair),
        *flags,
        compiler.identity,
        platform.machine(),
    ):
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def _compile(compiler: Compiler, flags: tuple[str, ...], path: Path) -> None:
    """Whole or not at all: two processes may compile the same."""
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder,
        whole_file(path, durable=False) as made,
    ):
        for name, text in sources().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        command = [*compiler.command, *flags, "-o", str(made), str(Path(folder) / SOURCE)]
        command += _libraries(compiler)  # behind the source: a linker drops what nothing has asked for yet
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _failed(compiler, f"it took more than {_COMPILE_SECONDS} s") from error
        if done.returncode or not made.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            said = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise _failed(compiler, said.replace(folder + os.sep, ""))


def _failed(compiler: Compiler, why: str) -> EnvironmentLacksError:
    return EnvironmentLacksError(
        f"{compiler.name} could not compile svdq's CPU engine: {why}",
        hint="set CXX to another C++ compiler, or use --backend reference",
        kind="compiler-failed",
    )
