"""This machine: which device to use, moving solutions there, and the memory a run has taken at its peak."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace

import torch

from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.records import LayerSolution, PeakFacts


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
            hint="use --device cpu; svdq doctor shows what is here",
        )
    return device


def peak_memory() -> PeakFacts:
    """Highest resident memory of this process so far, and of the GPU allocator (None without a GPU)."""
    unit = 1 if sys.platform == "darwin" else 1024
    ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakFacts(ram, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None)


def on_device(solution: LayerSolution, device: torch.device) -> LayerSolution:
    """The same solution with its tensors on `device`."""
    moved = {
        name: value.to(device)
        for name in solution.__dataclass_fields__
        if isinstance(value := getattr(solution, name), torch.Tensor)
    }
    return replace(solution, **moved)
