"""How long a pass took for an image, and whether it had the processor to itself meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.json_files import read_json

TIMES_FILE = "times.json"
# On a CPU the thread that samples works all the time, however many others help it. Where more wall time passes than
# this many times what it worked, it waited: for other programs, for a limit on processors or for a disk.
MOST_WALL_TIME = 1.25
BUSY = "the machine was busy"


@dataclass(frozen=True, slots=True)
class PassTime:
    """Means over the images of a pass, in seconds.

    `wall`: of the clock. `processor`: of all processors and threads together, None where it was not noted. `working`:
    of the thread that samples alone, None where a GPU does the work: it may wait as long as it likes.
    """

    wall: float
    processor: float | None = None
    working: float | None = None

    @property
    def was_busy(self) -> bool | None:
        """Whether the machine was so busy with other work that `wall` says nothing of the model. None: unknown."""
        return None if self.working is None else self.wall > MOST_WALL_TIME * self.working


@dataclass(frozen=True, slots=True)
class Clock:
    """Three clocks, started at once; to be read by the thread that started them."""

    on_cpu: bool
    wall: float
    processor: float
    working: float

    def note(self, folder: Path, way: str, *, images: int) -> None:
        """Add the time since the start to that of the pass `way`, over all runs into this folder."""
        note_time(
            *(folder, way),
            images=images,
            seconds=time.monotonic() - self.wall,
            processor_seconds=time.process_time() - self.processor,
            working_seconds=time.thread_time() - self.working if self.on_cpu else None,
        )


def start_clock(device: torch.device) -> Clock:
    """`device`: the one that does the work."""
    return Clock(device.type == "cpu", time.monotonic(), time.process_time(), time.thread_time())


def note_time(
    folder: Path,
    way: str,
    *,
    images: int,
    seconds: float,
    processor_seconds: float | None = None,
    working_seconds: float | None = None,
) -> None:
    """Add to the time of a pass so far. What one of its runs does not know is unknown of the pass; see `PassTime`."""
    times = dict(_times(folder))
    spent: Mapping[str, float | None] = {
        "pictures": images,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "working_seconds": working_seconds,
    }
    before = times.get(way, dict.fromkeys(spent, 0))
    times[way] = {key: _sum(before.get(key), more) for key, more in spent.items()}
    write_text(folder / TIMES_FILE, json.dumps(times, indent=1) + "\n")


def time_of(folder: Path, way: str) -> PassTime | None:
    """Of one image of a pass; None where none was generated."""
    found = _times(folder).get(way)
    if not found or not (images := found["pictures"]):
        return None
    means = {key: None if total is None else total / images for key, total in found.items()}
    wall = means["seconds"]
    assert wall is not None
    return PassTime(wall, means.get("processor_seconds"), means.get("working_seconds"))


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _times(folder: Path) -> dict[str, dict[str, float | None]]:
    path = folder / TIMES_FILE
    return cast("dict[str, dict[str, float | None]]", read_json(path)) if path.is_file() else {}
