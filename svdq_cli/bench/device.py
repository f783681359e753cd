"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from svdq_cli.bench.report import BenchDevice
from svdq_cli.cpu.engine import lack_of_engine
from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.gpu.launch import cuda_device

NVIDIA_SMI_SECONDS = 10


def device_facts(device: torch.device) -> BenchDevice:
    """Name and versions. `None` for what this device does not have."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return BenchDevice(
            name=torch.cuda.get_device_name(device),
            sm=f"{major}{minor}",
            backend="reference" if lack_of_kernels(device) else "kernels",
            driver=_driver(),
            cuda=torch.version.cuda,
            torch=str(torch.__version__),
            threads=None,
        )
    return BenchDevice(
        name=_cpu_name(),
        sm=None,
        backend="reference" if lack_of_engine() else "cpu",
        driver=None,
        cuda=None,
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
    )


def lack_of_kernels(device: torch.device) -> str | None:
    """Why the CUDA kernels can't run on a device, or None."""
    try:
        cuda_device(device)
    except EnvironmentLacksError as lack:
        return lack.message
    return None


def load_average() -> float | None:
    """Processes that wanted a core in the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    """The model where the system tells it (Linux), else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """The NVIDIA driver's version; torch knows only the CUDA version it was built for."""
    found = _nvidia_smi("driver_version")
    return found[0] if found else None


def clocks(device: torch.device) -> dict[str, str] | None:
    """How a GPU runs now: figures of a card that throttles are not another's. None where no driver tells."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    found = _nvidia_smi(",".join(names), "--id", str(device.index or 0))
    return dict(zip(names, found, strict=True)) if found and len(found) == len(names) else None


def _nvidia_smi(query: str, *options: str) -> list[str]:
    """What nvidia-smi says of a GPU, of the first one without `--id`; nothing where it says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    words = [program, f"--query-gpu={query}", "--format=csv,noheader", *options]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = answer.stdout.strip().splitlines()
    return [word.strip() for word in lines[0].split(",")] if lines else []
