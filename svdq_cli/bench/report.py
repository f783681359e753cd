"""What a benchmark found. Field names are the JSON keys of the command-line contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FUSED, NO_BRANCH, UNFUSED = "fused", "no-branch", "unfused-branch"  # modes of the CPU engine


@dataclass(frozen=True, slots=True)
class Microseconds:
    """Median and spread of one call's duration."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One operation on one shape: x (M, K) times a weight (N, K), with a branch of rank R."""

    layer: str  # the shape's name, or the first of the checkpoint's layers that have this shape
    op: str  # "linear", "w4a4 linear", "w4a16 linear", "gemm", "w4a4 gemm", "quantize and down"
    mode: str  # what computes it: "torch", "bitsandbytes", "reference", "kernels", "kernels + torch branch",
    # "hopper exact", "hopper w4a8", "hopper fp8"; on the CPU engine "fused", "no-branch", "unfused-branch"
    precision: str
    m: int
    k: int
    n: int
    rank: int | None  # None where the operation has no branch; 0 where it is left out
    us: Microseconds
    tflops: float  # 2 M K N over the median: the branch is overhead, not work
    baseline: str
    ratio: float  # the baseline's median over this one: above 1 is faster
    # What the branch adds to a layer on the CPU engine, as a part of that layer without it: the median over calls next
    # to each other. None where the two were not measured in turns
    branch_cost: float | None
    floor_us: float | None  # its least bytes over the measured speed of copying, where these decide the time
    # Frobenius norm, against the operation's own definition in float64; None of a whole step
    relative_error: float | None
    exactness: str


@dataclass(frozen=True, slots=True)
class BenchDevice:
    """What was measured on, and with what."""

    name: str
    sm: str | None
    backend: str
    driver: str | None
    cuda: str | None
    torch: str
    threads: int | None  # of torch on a CPU


@dataclass(frozen=True, slots=True)
class StepRow:
    """One denoising step of a whole transformer with random weights."""

    model: str
    precision: str
    mode: str  # "eager", "CUDA graph", "torch.compile"
    rank: int | None
    us: Microseconds
    ratio: float  # the 16-bit model's eager median over this one
    peak_bytes: int | None  # of tensors, weights included; on a CPU, of the process, as the system counts it
    memory_ratio: float | None  # the 16-bit model's peak over this one


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """The baseline's median over that of the W4A4 layers, which gates speak of: above 1 is faster."""

    mean: float
    min: float


def layer_ratios(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """The rows that tell how fast whole W4A4 layers are, on the fastest backend that was measured, each once."""
    first = rows[0].baseline if rows else None
    ours = [row for row in rows if row.rank is not None and row.baseline == first]
    fused = [row for row in ours if (row.op, row.mode) == ("linear", "fused")]
    return fused or [row for row in ours if row.op == "w4a4 linear"]


@dataclass(frozen=True, slots=True)
class BenchReport:
    device: BenchDevice
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...]
    steps: tuple[StepRow, ...] = ()
    speed_ratio: SpeedRatio | None = None  # None where no W4A4 layer was measured
    gates_missed: tuple[str, ...] = ()
    command: str = "bench"
    status: str = "ok"
    schema: int = 1
