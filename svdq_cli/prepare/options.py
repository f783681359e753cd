"""Options of a run that are not part of its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdq_cli.system.distributed import ALONE, Team


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is made. Never changes the bytes that come out, but for the lowest bits of layers that are solved on
    another type of device."""

    device: str = "auto"
    overwrite: bool = False
    beside: Path | None = None  # the recipe's folder, for relative paths in it
    work: Path | None = None  # where unfinished work is kept; None: next to the first output
    resume: bool = False  # continue with the work that is kept there
    max_ram: int | None = None  # bytes this process may take; None: what the machine has free
    max_vram: int | None = None  # the same of the GPU's memory
    team: Team = ALONE  # the processes that share the work


DEFAULT_OPTIONS = RunOptions()
