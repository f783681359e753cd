"""Gates: conditions on the figures of a report, from a recipe (`psnr_db: ">= 20"`) or from `--fail-if "psnr_db<20"`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from svdq_cli.errors import UsageError
from svdq_cli.metrics import METRICS as IMAGE_METRICS
from svdq_cli.recipe.problems import nearest

Operator = Literal[">=", ">", "<=", "<", "==", "!="]

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_OPPOSITE: dict[Operator, Operator] = {">=": "<", ">": "<=", "<=": ">", "<": ">=", "==": "!=", "!=": "=="}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
CONDITION_PATTERN = rf"^\s*(>=|<=|==|!=|>|<)\s*({_NUMBER})\s*$"

_PER_IMAGE = [key for key, metric in IMAGE_METRICS.items() if metric.kind != "all images"]
# What a gate may speak of -> where the value is in the JSON of `svdq convert`, `svdq eval` or `svdq bench`.
METRICS: dict[str, str] = {
    **{f"{figure}.{part}": f"{figure}.{part}" for figure in _PER_IMAGE for part in ("mean", "min", "max")},
    **{key: f"{key}.mean" if key in _PER_IMAGE else key for key in IMAGE_METRICS},
    "layer_sqnr_db": "layer_sqnr_db.mean",
    "layer_sqnr_db.mean": "layer_sqnr_db.mean",
    "layer_sqnr_db.min": "layer_sqnr_db.min",
    "noise_floor_psnr_db": "noise_floor_psnr_db",
    "own_noise_psnr_db": "own_noise_psnr_db",
    "output_sqnr_db": "output_sqnr_db.sum",
    "output_sqnr_db.step": "output_sqnr_db.step",
    "output_sqnr_db.sum": "output_sqnr_db.sum",
    "worst_frame_psnr_db": "video.worst_frame_psnr_db.min",
    "worst_frame_ssim": "video.worst_frame_ssim.min",
    "temporal_psnr_db": "video.temporal_psnr_db.mean",
    "audio_snr_db": "video.audio_snr_db.mean",
    "size_ratio": "bytes.ratio",
    "speed_ratio": "speed_ratio.mean",
    "speed_ratio.mean": "speed_ratio.mean",
    "speed_ratio.min": "speed_ratio.min",
    "bytes.output": "bytes.output",
    "bytes.ratio": "bytes.ratio",
    "seconds.total": "seconds.total",
    "peak.ram_bytes": "peak.ram_bytes",
    "peak.vram_bytes": "peak.vram_bytes",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition that a figure must meet: `psnr_db >= 20`."""

    metric: str
    operator: Operator
    bound: float

    def holds(self, value: float) -> bool:
        """Whether a measured figure meets the condition. A figure that is not a number meets none."""
        return not math.isnan(value) and _COMPARE[self.operator](value, self.bound)

    @property
    def condition(self) -> str:
        return f"{self.operator} {int(self.bound) if self.bound.is_integer() else self.bound}"

    def __str__(self) -> str:
        return f"{self.metric} {self.condition}"


def parse_gate(metric: str, condition: str) -> Gate:
    """A gate of a recipe: the condition that must hold. Raises UsageError."""
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", hint=nearest(metric, METRICS))
    found = re.match(CONDITION_PATTERN, condition)
    if found is None or not math.isfinite(float(found[2])):
        raise UsageError(
            f"{condition!r} is not a condition on {metric}",
            hint='write it like ">= 20" (>=, >, <=, <, ==, !=)',
        )
    return Gate(metric, cast(Operator, found[1]), float(found[2]))


def parse_fail_if(text: str) -> Gate:
    """`--fail-if "psnr_db<20"`: the condition that must NOT hold, so the gate is its opposite. Raises UsageError."""
    found = re.match(r"\s*([A-Za-z_][\w.]*)(.*)", text, re.DOTALL)
    if found is None:
        raise UsageError(f"--fail-if {text!r} does not name a metric", hint='write it like "psnr_db<20"')
    gate = parse_gate(found[1], found[2])
    return Gate(gate.metric, _OPPOSITE[gate.operator], gate.bound)


def section_of(gate: Gate) -> str:
    """The report's key of a gate's metric: "lpips" for `lpips.max`."""
    return METRICS[gate.metric].partition(".")[0]


def figure_of(gate: Gate, report: Mapping[str, object]) -> float | None:
    """The figure a gate speaks of, from a report's JSON object; None when this report has no such figure."""
    *sections, last = METRICS[gate.metric].split(".")
    for section in sections:
        inner = report.get(section)
        report = cast("Mapping[str, object]", inner) if isinstance(inner, Mapping) else {}
    value = report.get(last)
    return float(value) if isinstance(value, (int, float)) else None
