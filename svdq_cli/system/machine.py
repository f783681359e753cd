"""This machine: which device to use, moving solutions there, and the memory a run has taken at its peak."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.records import LayerSolution
from svdq_cli.reports import PeakFacts

Solution = TypeVar("Solution", bound=LayerSolution)


def resolve_device(wanted: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device. Raises EnvironmentLacksError for a GPU that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"unknown device {wanted!r}", hint="use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {wanted!r} is not supported", hint="use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentLacksError(
            f"no CUDA device {wanted!r} on this machine",
            hint="use --device cpu; svdq doctor shows this machine's; convert --plan --gpu GPU predicts for any GPU",
        )
    return device


def peak_memory() -> PeakFacts:
    """Highest resident memory of this process so far, and of the GPU allocator (None without a GPU)."""
    return PeakFacts(_peak_ram(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None)


def _peak_ram() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def on_device(solution: Solution, device: torch.device) -> Solution:
    """A solution with its tensors on `device`."""
    moved = {
        name: value.to(device)
        for name in solution.__dataclass_fields__
        if isinstance(value := getattr(solution, name), torch.Tensor)
    }
    return replace(solution, **moved)


def available_ram() -> int:
    """Bytes that this process may still take: what the machine has free, or what a container leaves of its limit."""
    return min([psutil.virtual_memory().available, *_cgroup_room()])


def resident_ram() -> int:
    """Bytes that this process holds."""
    return psutil.Process().memory_info().rss


def available_vram(device: torch.device) -> int:
    """Bytes that this process may still take on a GPU, its own allocator's free blocks included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def limit_vram(device: torch.device, most: int | None) -> None:
    """Let torch's allocator take no more than `most` bytes of a GPU; it raises its out-of-memory error at that."""
    if device.type == "cuda" and most is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def _cgroup_room() -> list[int]:
    """cgroup v2's limit less its use, where there is one. Cached files count as used and as free at once; they are
    given back first."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [] if limit == "max" else [max(0, int(limit) - used + int(facts.get("inactive_file", 0)))]
    except (OSError, ValueError):
        return []
