"""Which of Hopper's modes is the default: decided by a measurement that ships with the kernels, or by none.

`kernels/measure.py modes` writes the measurement; as `kernels/measured_sm_90a.json` it takes effect. Without it int4
layers run on the portable kernels, whose arithmetic is that of mode EXACT: a kernel that no GPU has run is not a
default.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.experimental.hopper.modes import HopperMode, hopper_mode
from svdq_cli.storage.resources import data_root

PORTABLE = "portable"  # the kernels that every card runs
FILE_NAME = "measured_sm_90a.json"
LEAST_PSNR_DB = 35.0  # of images against those of mode EXACT


@dataclass(frozen=True, slots=True)
class ModeMeasurement:
    """What one mode costs and what it changes. One entry of the file's list "modes"."""

    mode: str  # a label of HopperMode, or PORTABLE
    step_us: float  # a step of a FLUX.1-dev-shaped transformer
    psnr_db: float  # of the embedded model's images against those of mode EXACT; 100 where they are the same


@dataclass(frozen=True, slots=True)
class HopperChoice:
    """`mode` None: the portable kernels."""

    mode: HopperMode | None
    reason: str


def choose_hopper_mode(measured: Iterable[ModeMeasurement]) -> HopperChoice:
    """The fastest mode whose images are near enough to mode EXACT's."""
    near = [found for found in measured if found.psnr_db >= LEAST_PSNR_DB]
    if not near:
        return HopperChoice(
            None, "int4 exact on the portable kernels: the Hopper kernels have not been measured yet"
        )
    best = min(near, key=lambda found: found.step_us)
    said = f"the fastest measured ({best.step_us / 1000:.1f} ms a step, {best.psnr_db:.0f} dB to exact)"
    if best.mode == PORTABLE:
        return HopperChoice(None, f"int4 exact on the portable kernels: {said}")
    return HopperChoice(hopper_mode(best.mode), f"int4 in mode {best.mode}: {said}")


def measured_modes(path: Path | None = None) -> tuple[ModeMeasurement, ...]:
    """What the file holds; nothing where there is none. `path` defaults to the one next to the kernels."""
    path = path or data_root("kernels") / FILE_NAME
    if not path.is_file():
        return ()
    found = json.loads(path.read_text(encoding="utf-8"))["modes"]
    return tuple(ModeMeasurement(item["mode"], item["step_us"], item["psnr_db"]) for item in found)
