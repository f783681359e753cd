"""A kernel of `kernels/` as machine code, from a cache in the user's folder or compiled now."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from svdq_cli.gpu import nvrtc
from svdq_cli.storage.atomic import cache_errors, whole_file
from svdq_cli.storage.resources import cache_folder, data_root

# No contraction of a * b + c into one rounding: where a kernel wants that, it says fmaf, and its reference does so. A
# code halfway between two others would otherwise be another than the definition's.
_OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v")


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its compile-time constants: `<kernel>.cu` in `kernels/`, whose entry has the file's name."""

    kernel: str  # may name a folder: "probes/mma_rate"
    defines: tuple[tuple[str, int], ...]

    @property
    def entry(self) -> str:
        return self.kernel.rpartition("/")[2]

    @property
    def dynamic_shared(self) -> int:
        """Bytes of shared memory that a launch must ask for."""
        return dict(self.defines).get("DYNAMIC_SHARED", 0)

    @property
    def label(self) -> str:
        return " ".join((self.kernel, *(f"{name}={value}" for name, value in self.defines)))


@dataclass(frozen=True, slots=True)
class Usage:
    """What the assembler reports of one kernel."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # static
    serialized: bool  # wgmma products wait for each other, which the assembler warns of


@dataclass(frozen=True, slots=True)
class Cubin:
    path: Path
    usage: Usage


def compile_variant(variant: Variant, target: str, *, cache: Path | None = None) -> Cubin:
    """The machine code of `variant` for `target` ("sm_90a"), compiled unless the cache has it.

    `cache` defaults to `cache_folder() / "kernels"`. Raises EnvironmentLacksError without NVRTC, nvrtc.CompileError for
    a source that does not compile.
    """
    options = (
        f"--gpu-architecture={target}",
        *_OPTIONS,
        *(f"-D{name}={value}" for name, value in variant.defines),
    )
    source, headers = read_source(variant.kernel), read_headers()
    key = _key(source, headers, options)
    path = (cache or cache_folder() / "kernels") / f"{variant.entry}-{target}-{key}.cubin"
    facts = path.with_suffix(".json")
    if not (path.is_file() and facts.is_file()):
        compiled = nvrtc.compile_source(source, name=f"{variant.entry}.cu", headers=headers, options=options)
        usage = usage_of(compiled.log)
        with cache_errors(path.parent, "compiled kernels"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, compiled.cubin)
            _write(facts, json.dumps(asdict(usage)).encode())
    return Cubin(path, Usage(**json.loads(facts.read_text(encoding="utf-8"))))


def kernel_files(ending: str) -> tuple[Path, ...]:
    """The kernels' sources (".cu") or shared parts (".cuh"), with those of `kernels/experimental/`; each name once."""
    root = data_root("kernels")
    return tuple(sorted((*root.glob(f"*{ending}"), *root.glob(f"experimental/*/*{ending}"))))


@functools.cache
def read_source(kernel: str) -> str:
    sources = {path.stem: path for path in kernel_files(".cu")}
    return sources.get(kernel, data_root("kernels") / f"{kernel}.cu").read_text(encoding="utf-8")


@functools.cache
def read_headers() -> Mapping[str, str]:
    """The shared parts, by the name they are included by."""
    return {path.name: path.read_text(encoding="utf-8") for path in kernel_files(".cuh")}


def _key(source: str, headers: Mapping[str, str], options: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for text in (
        source,
        *(part for pair in headers.items() for part in pair),
        *options,
        str(nvrtc.version()),
    ):
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def usage_of(log: str) -> Usage:
    """Resource usage of a kernel, from the assembler's log: "0 bytes stack frame, 0 bytes spill stores, ...", "Used 40
    registers, ..."."""

    def number(pattern: str, *, missing: int | None = None) -> int:
        found = re.findall(pattern, log)
        if not found and missing is None:
            raise RuntimeError(f"the assembler's log does not say {pattern!r}:\n{log}")
        return sum(map(int, found)) if found else int(missing or 0)

    return Usage(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=number(r"(\d+) bytes smem", missing=0),
        serialized="instructions are serialized" in log,
    )


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: two processes may compile the same kernel."""
    with whole_file(path, durable=False) as partial:
        partial.write_bytes(content)
