"""What this machine can do: versions, GPU, and a self-test of every backend."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
import torch

from svdq_cli import __version__
from svdq_cli.cpu.build import find_compiler
from svdq_cli.cpu.engine import engine, lack_of_engine
from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.evaluation.layers import layer_sqnr_db
from svdq_cli.experimental.hopper.selftest import kernel_cases
from svdq_cli.formats import DEFAULT, format_named
from svdq_cli.gpu import nvrtc
from svdq_cli.gpu.architectures import Architecture, architecture
from svdq_cli.gpu.compile import cache_folder, compile_variant
from svdq_cli.gpu.launch import CudaDevice, cuda_device
from svdq_cli.prepare.locate import locate_source
from svdq_cli.records import Int4, Linear, NvFp4, Precision, SharedInput, SolveSettings, W4A4Plan, W4A16Plan
from svdq_cli.runtime.cpu_selftest import MOST, EngineCase, engine_cases
from svdq_cli.runtime.large_blocks import has_large_blocks, prove_large_blocks
from svdq_cli.runtime.selftest import KernelCase
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.linear import solve_input
from svdq_cli.source import open_source
from svdq_cli.storage.atomic import existing
from svdq_cli.system.machine import available_ram
from svdq_cli.text import bytes_text

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "datasets", "pydantic", "cupy")
OPTIONAL = {  # what svdq does with them
    "kernels": "diffusers' own 4-bit runtime",
    "peft": "LoRAs on 16-bit pipelines",
    "gguf": "models in GGUF files",
    "lpips": "LPIPS in eval",
    "torchvision": "FID in eval, pipelines whose text encoders see images (Qwen-Image-Edit, Qwen-Image 2.1)",
    "bitsandbytes": "text encoders with 4-bit weights, NF4 as a baseline in eval",
}
# Random Gaussian layers reach about 18 dB (int4) and 20 dB (nvfp4) at rank 16; half of that means broken arithmetic.
LEAST_SQNR_DB = 10.0
# What kernels are compiled for where there is no GPU to run them on
TARGET_WITHOUT_GPU = architecture("sm_90a")


@dataclass(frozen=True, slots=True)
class SelfTest:
    """One operation, run and compared with its definition."""

    op: str
    precision: str
    mode: str
    backend: str
    status: Literal["ok", "failed", "unavailable"]
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Bytes; `disk_free_bytes` by folder: where svdq was started, and its cache. `cores`: of the CPU."""

    cores: int
    ram_bytes: int
    ram_free_bytes: int
    vram_bytes: int | None
    vram_free_bytes: int | None
    disk_free_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """`optional`: versions of packages that svdq does without. `hub_login`: whether a token for the Hugging Face hub is
    stored here; it is not tried. `summary`: what this machine can do, in a sentence."""

    svdq_version: str
    python: str
    packages: Mapping[str, str | None]
    optional: Mapping[str, str | None]
    device: Mapping[str, object]
    machine: MachineFacts
    hub_login: bool
    tests: tuple[SelfTest, ...]
    summary: str
    status: str
    command: str = "doctor"
    schema: int = 1


def diagnose() -> DoctorReport:
    """Never raises for what is merely missing: that is a line of the report."""
    layers = (_test_layer(precision) for precision in (Int4(), NvFp4(), None))
    tests = (_test_embedded_model(), *layers, *_test_engine(), _test_compiler(), *_test_kernels())
    device, machine = _device(), _machine()
    return DoctorReport(
        svdq_version=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        optional={name: _version(name) for name in OPTIONAL},
        device=device,
        machine=machine,
        hub_login=_is_logged_in(),
        tests=tests,
        summary=summary_of(device, machine, tests),
        status="failed" if any(test.status == "failed" for test in tests) else "ok",
    )


def summary_of(device: Mapping[str, object], machine: MachineFacts, tests: Sequence[SelfTest]) -> str:
    """What this machine can do, for a person who wants to know only that."""
    if failed := [test for test in tests if test.status == "failed"]:
        first = failed[0]
        return (
            f"{len(failed)} of {len(tests)} self-tests failed, the first {first.op} ({first.backend}): {first.detail}; "
            "do not rely on results of this machine"
        )
    ram = f"{bytes_text(machine.ram_free_bytes)} of RAM free"
    match device["backend"]:
        case "kernels":
            memory = f", {bytes_text(machine.vram_bytes)}" if machine.vram_bytes else ""
            return (
                f"this machine converts models and generates with them on {device['name']}{memory}, by svdq's 4-bit "
                f"kernels; {ram}"
            )
        case "cpu":
            slow = "generates with them on the CPU, by svdq's 4-bit engine"
        case _:
            slow = "generates with them by the reference backend, which is slow"
    why = (
        f"its GPU ({device['name']}) can't run svdq's kernels" if device["sm"] else "torch sees no NVIDIA GPU"
    )
    return f"this machine converts models and {slow}; {why}; {ram}"


def _machine() -> MachineFacts:
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (None, None)
    folders = {str(Path.cwd()), str(existing(cache_folder()))}
    return MachineFacts(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_bytes=psutil.virtual_memory().total,
        ram_free_bytes=available_ram(),
        vram_bytes=total,
        vram_free_bytes=free,
        disk_free_bytes={folder: shutil.disk_usage(folder).free for folder in sorted(folders)},
    )


def _is_logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _test_embedded_model() -> SelfTest:
    started = time.monotonic()
    try:
        count = len(open_source(locate_source("demo")).tensors)
    except Exception as error:
        return SelfTest("embedded model", "-", "-", "-", "failed", str(error), time.monotonic() - started)
    return SelfTest("embedded model", "-", "-", "-", "ok", f"{count} tensors", time.monotonic() - started)


def _test_layer(precision: Precision | None) -> SelfTest:
    """Solve, encode, decode and run one 256 x 256 layer; W4A16 where `precision` is None."""
    started = time.monotonic()
    op, name = ("w4a4 linear", precision.name) if precision else ("w4a16 linear", "int4")
    try:
        sqnr = _round_trip_sqnr(precision)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return SelfTest(op, name, "-", "reference", "failed", said, time.monotonic() - started)
    status = "ok" if sqnr > LEAST_SQNR_DB else "failed"
    return SelfTest(op, name, "-", "reference", status, f"{sqnr:.1f} dB", time.monotonic() - started)


def _round_trip_sqnr(precision: Precision | None) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator, dtype=torch.float32) / 16
    rows = torch.randn(64, 256, generator=generator, dtype=torch.float32)
    linear = Linear("layer", 256, 256, bias=False)
    plan = W4A4Plan(linear, precision, 16) if precision else W4A16Plan(linear)
    shared = SharedInput("layer", ("layer",), (("layer",),))
    settings = SolveSettings("none", 0, torch.bfloat16)
    solved = solve_input(shared, {"layer": plan}, {"layer": LinearWeights(weight, None)}, None, settings)
    (solution,) = solved.solutions
    fmt = format_named(DEFAULT)
    return layer_sqnr_db(weight, None, fmt.decode(plan, fmt.encode(solution)), rows)


def _test_engine() -> Iterator[SelfTest]:
    """Whether the CPU engine is here or can be compiled, and every one of its operations against its definition."""
    started = time.monotonic()
    if lack := lack_of_engine():
        said = f"{lack.message}; {lack.hint}"
        yield SelfTest("engine", "-", "-", "cpu", "unavailable", said, time.monotonic() - started)
        return
    compiler = find_compiler()
    said = f"{engine().isa.name}, compiled by {compiler.name if compiler else 'another machine'}"
    yield SelfTest("engine", "-", "-", "cpu", "ok", said, time.monotonic() - started)
    yield from map(_run_on_cpu, engine_cases(torch.bfloat16))


def _run_on_cpu(case: EngineCase) -> SelfTest:
    started = time.monotonic()
    try:
        found = case.disagreement()
        status = "ok" if found <= MOST else "failed"
        said = (
            f"equal to its definition but for {found:.1e} of the numbers"
            if found
            else "equal to its definition"
        )
    except Exception as error:
        status, said = "failed", f"{type(error).__name__}: {error}"
    return SelfTest(case.op, case.precision, case.mode, "cpu", status, said, time.monotonic() - started)


def _test_compiler() -> SelfTest:
    """Whether NVRTC is here, and new enough for the kernels."""
    started = time.monotonic()
    try:
        status, said = "ok", f"version {'.'.join(map(str, nvrtc.version()))}"
    except EnvironmentLacksError as lack:
        status, said = "unavailable", f"{lack.message}; {lack.hint}"
    return SelfTest("nvrtc", "-", "-", "-", status, said, time.monotonic() - started)


def _test_kernels() -> Iterator[SelfTest]:
    """Every kernel against its reference on this machine's GPU; without a GPU, whether it compiles."""
    try:
        gpu = cuda_device(torch.device("cuda"))
    except EnvironmentLacksError as lack:
        for case in kernel_cases(torch.bfloat16, TARGET_WITHOUT_GPU):
            yield _compile_only(case, lack.message)
        return
    for case in kernel_cases(_dtype_of(gpu.architecture), gpu.architecture):
        yield _run_kernel(case, gpu)
    if has_large_blocks(gpu.architecture):
        yield _try_large_blocks(gpu)


def _try_large_blocks(gpu: CudaDevice) -> SelfTest:
    """Their trial, now: where they failed once, this is how they get another chance."""
    started = time.monotonic()
    found = prove_large_blocks(gpu, again=True)
    if found is None:
        status, said = "unavailable", "the trial could not run; blocks of 128 rows are used"
    elif found.sound:
        status, said = "ok", f"{gpu.architecture.target}, {found.reason}"
    else:
        status, said = "failed", f"{gpu.architecture.target}: {found.reason}; blocks of 128 rows are used"
    return SelfTest("large blocks", "-", "-", "kernels", status, said, time.monotonic() - started)


def _run_kernel(case: KernelCase, gpu: CudaDevice) -> SelfTest:
    started = time.monotonic()
    target = gpu.architecture.target
    try:
        found = case.disagreement(gpu, torch.device("cuda", gpu.index))
        status = "ok" if found <= case.most else "failed"
        said = f"{target}, differs from its definition by {found:.1e}"
    except Exception as error:
        status, said = "failed", f"{target}: {type(error).__name__}: {error}"
    return SelfTest(case.op, case.precision, case.mode, "kernels", status, said, time.monotonic() - started)


def _compile_only(case: KernelCase, lack: str) -> SelfTest:
    started = time.monotonic()
    target = TARGET_WITHOUT_GPU.target
    try:
        usage = compile_variant(case.variant(TARGET_WITHOUT_GPU), target).usage
        status, said = (
            "unavailable",
            f"{lack}; compiles for {target}: {usage.registers} registers, {usage.spill_bytes} bytes spilled",
        )
    except EnvironmentLacksError as error:
        # Where a GPU lacks nothing but the compiler, that is the lack already
        status, said = "unavailable", lack if error.message in lack else f"{lack}; {error.message}"
    except Exception as error:
        status, said = "failed", f"{target}: {type(error).__name__}: {error}"
    return SelfTest(case.op, case.precision, case.mode, "kernels", status, said, time.monotonic() - started)


def _dtype_of(kind: Architecture) -> torch.dtype:
    return torch.bfloat16 if kind.bfloat16 else torch.float16


def _backend_here() -> str:
    try:
        cuda_device(torch.device("cuda"))
    except EnvironmentLacksError:
        return "reference" if lack_of_engine() else "cpu"
    return "kernels"


def _device() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {
            "name": platform.processor() or platform.machine(),
            "sm": None,
            "backend": _backend_here(),
            "cuda": None,
        }
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "sm": f"{major}{minor}",
        "backend": _backend_here(),
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    names = ("cupy-cuda13x", "cupy-cuda12x", "cupy") if package == "cupy" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
