"""NVIDIA's run-time compiler, by ctypes: CUDA C++ in, machine code out. Needs no driver, no GPU, no toolkit.

Not through CuPy: it asks the driver for the architecture, and a plain sm_90 has no wgmma.
Reference: NVRTC documentation, "User Interface".
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from svdq_cli.errors import EnvironmentLacksError

LEAST_VERSION = (12, 8)  # the first that knows sm_120a


class CompileError(Exception):
    """NVRTC refused a source. The message is its log."""


@dataclass(frozen=True, slots=True)
class Compiled:
    cubin: bytes
    log: str


def compile_source(source: str, *, name: str, headers: Mapping[str, str], options: Sequence[str]) -> Compiled:
    """Machine code of one file. `headers` by the name they are included by. Raises CompileError with NVRTC's log, and
    EnvironmentLacksError without NVRTC."""
    library = _library()
    program = ctypes.c_void_p()
    names = _strings(headers.keys())
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(names),
            _strings(headers.values()),
            names,
        )
    )
    try:
        status = library.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _fetch(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
        if status != 0:
            raise CompileError(f"{name} with {' '.join(options)}:\n{_text(log)}")
        return Compiled(_fetch(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), _text(log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> tuple[int, int]:
    """NVRTC's version. Raises EnvironmentLacksError where there is none, or only one older than LEAST_VERSION."""
    return _version_of(_library())


def require_version(least: tuple[int, int], target: str) -> None:
    """Raises EnvironmentLacksError where NVRTC is missing, or too old for a target."""
    if (found := version()) < least:
        raise EnvironmentLacksError(
            f"NVRTC {_dotted(found)} does not know {target}: {_dotted(least)} or newer is needed",
            hint=f'upgrade it: pip install --upgrade "svdq[cuda{least[0]}]"',
            kind="no-nvrtc",
        )


@functools.cache
def _library() -> ctypes.CDLL:
    too_old: list[str] = []
    for path in _candidates():
        try:
            _load_builtins(Path(path))
            library = ctypes.CDLL(path)
        except OSError:
            continue
        found = _version_of(library)
        if found >= LEAST_VERSION:
            return library
        too_old.append(f"{path} is NVRTC {_dotted(found)}")
    wanted = f"NVRTC {_dotted(LEAST_VERSION)} or newer, the compiler of the CUDA kernels,"
    if too_old:
        raise EnvironmentLacksError(
            f"{'; '.join(too_old)}: too old. {wanted} is needed",
            hint='upgrade it: pip install --upgrade "svdq[cuda13]", or "svdq[cuda12]" for a CUDA 12 driver',
            kind="no-nvrtc",
        )
    raise EnvironmentLacksError(
        f"{wanted} is not installed",
        hint='install it: pip install "svdq[cuda13]", or "svdq[cuda12]" for a CUDA 12 driver',
        kind="no-nvrtc",
    )


def _version_of(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _candidates() -> Iterator[str]:
    """The wheels' libraries, then what the system finds. Those of the CUDA that torch was built for come first: a
    driver that runs torch loads their machine code, and may refuse a newer CUDA's. Then the newest."""
    pattern = "bin/**/nvrtc64_*.dll" if sys.platform == "win32" else "lib/libnvrtc.so.*"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = (path for path in Path(folder).glob(f"*/{pattern}") if "alt" not in path.name)
        yield from map(str, sorted(found, key=lambda path: (_of_torchs_cuda(path), path.name), reverse=True))
    if system := ctypes.util.find_library("nvrtc"):
        yield system


def _of_torchs_cuda(path: Path) -> bool:
    """Whether a library such as libnvrtc.so.13 or nvrtc64_130_0.dll is of the CUDA that torch was built for."""
    major = (torch.version.cuda or "").partition(".")[0]
    return bool(major) and re.search(rf"(\.so\.|nvrtc64_){major}", path.name) is not None


def _load_builtins(nvrtc: Path) -> None:
    """NVRTC opens its second library by name at the first compilation. Some wheels (13.0) don't say that it is stored
    next to the first, and then it is found only if it is loaded already. A bare name is the system's, which finds
    both."""
    pattern = "nvrtc-builtins64_*.dll" if sys.platform == "win32" else "libnvrtc-builtins.so.*"
    if nvrtc.is_absolute():
        for path in nvrtc.parent.glob(pattern):
            ctypes.CDLL(str(path))


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _fetch(size_of: Callable[..., int], fetch: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(fetch(program, buffer))
    return buffer.raw


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace").strip()


def _check(status: int) -> None:
    if status != 0:
        describe = _library().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {describe(status).decode()}")
