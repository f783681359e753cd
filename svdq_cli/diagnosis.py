"""What this machine can do: versions, GPU, and a self-test of every backend."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

from svdq_cli import __version__
from svdq_cli.evaluate.layers import layer_sqnr_db
from svdq_cli.formats import FORMATS
from svdq_cli.locate import locate_source
from svdq_cli.records import Int4, Linear, NvFp4, Precision, SharedInput, SolveSettings, W4A4Plan, W4A16Plan
from svdq_cli.solve.forward import SourceWeight
from svdq_cli.solve.linear import solve_input
from svdq_cli.source import open_source

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "datasets", "pydantic", "cupy")
# Random Gaussian layers reach about 18 dB (int4) and 20 dB (nvfp4) at rank 16; half of that means broken arithmetic.
LEAST_SQNR_DB = 10.0


@dataclass(frozen=True, slots=True)
class SelfTest:
    """One operation, run and compared with its definition."""

    op: str
    precision: str
    backend: str
    status: Literal["ok", "failed", "unavailable"]
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class DoctorReport:
    svdq_version: str
    python: str
    packages: Mapping[str, str | None]
    device: Mapping[str, object]
    tests: tuple[SelfTest, ...]
    status: str
    command: str = "doctor"
    schema: int = 1


def diagnose() -> DoctorReport:
    """Never raises for what is merely missing: that is a line of the report."""
    tests = (_test_embedded_model(), *(_test_layer(p) for p in (Int4(), NvFp4(), None)), _kernels())
    return DoctorReport(
        svdq_version=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        device=_device(),
        tests=tests,
        status="failed" if any(test.status == "failed" for test in tests) else "ok",
    )


def _test_embedded_model() -> SelfTest:
    started = time.monotonic()
    try:
        count = len(open_source(locate_source("demo")).tensors)
    except Exception as error:
        return SelfTest("embedded model", "-", "-", "failed", str(error), time.monotonic() - started)
    return SelfTest("embedded model", "-", "-", "ok", f"{count} tensors", time.monotonic() - started)


def _test_layer(precision: Precision | None) -> SelfTest:
    """Solve, encode, decode and run one 256 x 256 layer; W4A16 where `precision` is None."""
    started = time.monotonic()
    op, name = ("w4a4 linear", precision.name) if precision else ("w4a16 linear", "int4")
    try:
        sqnr = _round_trip_sqnr(precision)
    except Exception as error:
        return SelfTest(
            op, name, "reference", "failed", f"{type(error).__name__}: {error}", time.monotonic() - started
        )
    status = "ok" if sqnr > LEAST_SQNR_DB else "failed"
    return SelfTest(op, name, "reference", status, f"{sqnr:.1f} dB", time.monotonic() - started)


def _round_trip_sqnr(precision: Precision | None) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator) / 16
    rows = torch.randn(64, 256, generator=generator)
    linear = Linear("layer", 256, 256, bias=False)
    plan = W4A4Plan(linear, precision, 16) if precision else W4A16Plan(linear)
    shared = SharedInput("layer", ("layer",), (("layer",),))
    settings = SolveSettings("datafree", "none", 0, torch.bfloat16)
    solved = solve_input(shared, {"layer": plan}, {"layer": SourceWeight(weight, None)}, None, settings)
    (solution,) = (*solved.w4a4, *solved.w4a16)
    fmt = FORMATS[0]
    return layer_sqnr_db(weight, None, fmt.decode(plan, fmt.encode(solution)), rows)


def _kernels() -> SelfTest:
    detail = "this version ships no CUDA kernels; the reference backend runs everywhere"
    return SelfTest("fused kernels", "-", "cuda", "unavailable", detail, 0.0)


def _device() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {
            "name": platform.processor() or platform.machine(),
            "sm": None,
            "backend": "reference",
            "cuda": None,
        }
    major, minor = torch.cuda.get_device_capability()
    return {
        "name": torch.cuda.get_device_name(),
        "sm": f"{major}{minor}",
        "backend": "reference",
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
