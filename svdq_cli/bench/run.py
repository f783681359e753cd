"""A benchmark: shapes of a named set with random weights, or the layers of a checkpoint, next to torch's own linear."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeGuard

import torch
from torch import Tensor

from svdq_cli.bench.baselines import gpu_baselines
from svdq_cli.bench.cases import BenchSettings, Case, plans_of, random_numbers, random_weight, solve_random
from svdq_cli.bench.cpu_operations import LINEAR, cpu_baselines, cpu_operations
from svdq_cli.bench.device import device_facts, lack_of_kernels, load_average
from svdq_cli.bench.hopper_operations import hopper_operations
from svdq_cli.bench.kernel_operations import kernel_operations
from svdq_cli.bench.measured_rows import BASELINES, SHORT, baseline_name, measured_rows
from svdq_cli.bench.operations import ROTATED, Operation, reference_linear, torch_linear, without_branch
from svdq_cli.bench.report import FUSED, BenchReport, BenchRow, StepRow
from svdq_cli.bench.shapes import MODULATION_ROWS, LinearShape, ShapeSet
from svdq_cli.bench.step import StepSettings, arithmetics, step_rows
from svdq_cli.bench.transformer import FLUX1_DEV_BLOCKS, FLUX1_DEV_STEP
from svdq_cli.cpu.engine import lack_of_engine
from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.experimental.hopper.operands import unsupported_reason as hopper_reason
from svdq_cli.gpu.launch import cuda_device
from svdq_cli.records import (
    Event,
    Int4,
    LayerPlan,
    LayerSolution,
    Linear,
    NvFp4,
    Observer,
    Precision,
    RotatedPlan,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    ignore_events,
)
from svdq_cli.runtime.cpu_operands import cpu_unsupported_reason
from svdq_cli.runtime.linear import NO_ROTATION
from svdq_cli.system.machine import on_device

PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (Int4(), NvFp4())}
RANK = 16
RANK_STEP = 16  # what every format packs
CHECKPOINT_ROWS = {"cpu": 68 * 8, "cuda": 4096}  # M of a checkpoint's W4A4 layers: as in the sets of shapes
BUSY = 0.5  # load average a core from which other work is worth a note


def precisions_named(name: str | None) -> tuple[Precision, ...]:
    """The precision of that name; both without one."""
    if name is None:
        return tuple(PRECISIONS.values())
    if name not in PRECISIONS:
        raise UsageError(f"unknown precision {name!r}", hint=f"use {' or '.join(PRECISIONS)}")
    return (PRECISIONS[name],)


def refuse_given(**given: object) -> None:
    """Raises UsageError for an option that a checkpoint has already decided."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"--{name} and a checkpoint: the checkpoint's own layers are measured",
                hint=f"leave out --{name}, or the checkpoint",
            )


def bench_shapes(
    shapes: ShapeSet,
    *,
    precisions: Sequence[Precision],
    rank: int = RANK,
    settings: BenchSettings,
    observe: Observer = ignore_events,
) -> BenchReport:
    """Random layers of the set's shapes, solved data-free. Raises UsageError for a rank that they can't have."""
    _require_rank(rank, shapes)
    cases: dict[tuple[int, int, int, str], Case] = {}
    for shape in shapes.shapes:
        m = settings.m if settings.m is not None and shape.role == "w4a4" else shape.m
        linear = Linear(shape.name, shape.k, shape.n, bias=False)
        plans = plans_of(linear, shape, precisions, rank)
        cases.setdefault(
            (m, shape.k, shape.n, shape.role),
            Case(linear, m, lambda plans=plans: solve_random(plans, settings)),
        )
    return _report(tuple(cases.values()), settings, observe)


def row_calls(
    shapes: Iterable[LinearShape], *, precisions: Sequence[Precision], rank: int, settings: BenchSettings
) -> Iterator[tuple[str, Callable[[], BenchRow]]]:
    """`bench_shapes` of a GPU one row at a time: what a row is called, and what measures it. Any row may be left out;
    the baseline is measured when the first of its shape is."""
    for shape in shapes:
        linear = Linear(shape.name, shape.k, shape.n, bias=False)
        plans = plans_of(linear, shape, precisions, rank)
        case = Case(linear, shape.m, lambda plans=plans: solve_random(plans, settings))
        yield from _row_calls(case, settings)


def _row_calls(case: Case, settings: BenchSettings) -> Iterator[tuple[str, Callable[[], BenchRow]]]:
    name, linear = case.linear.name, case.linear
    x = random_numbers(settings.seed, case.m, linear.in_features).to(settings.device)
    medians: dict[str, float] = {}

    def baseline() -> BenchRow:
        ((dtype, operation),) = _baselines(case, settings)
        (row,) = measured_rows(case, (operation,), x, settings, {})
        medians[baseline_name(dtype, settings.device)] = row.us.median
        return row

    def beside(operation: Callable[[], Operation]) -> BenchRow:
        if not medians:
            baseline()
        (row,) = measured_rows(case, (operation(),), x, settings, medians)
        return row

    yield f"{name}: torch", baseline
    for other, make in gpu_baselines(case.m):
        yield f"{name}: {other}", lambda make=make: beside(lambda: make(random_weight(settings, linear)))
    for operation in chain.from_iterable(_operations(case, settings)):
        rank = "" if operation.rank is None else f" R {operation.rank}"
        yield f"{name}: {operation.label}{rank}", lambda found=operation: beside(lambda: found)


def bench_layers(
    layers: Sequence[LayerPlan],
    solution_of: Callable[[LayerPlan], LayerSolution],
    *,
    settings: BenchSettings,
    observe: Observer = ignore_events,
) -> BenchReport:
    """A checkpoint's layers, one for each distinct shape, rank and kind, with the numbers stored for it."""
    distinct: dict[tuple[object, ...], LayerPlan] = {}
    for plan in layers:
        linear = plan.linear
        kind = _kind_of(plan)
        distinct.setdefault((linear.in_features, linear.out_features, kind), plan)
    rows = settings.m or CHECKPOINT_ROWS[settings.device.type]
    cases = [
        Case(
            plan.linear,
            MODULATION_ROWS if isinstance(plan, W4A16Plan) else rows,
            lambda plan=plan: (solution_of(plan),),
        )
        for plan in distinct.values()
    ]
    return _report(cases, settings, observe)


def _kind_of(plan: LayerPlan) -> tuple[object, ...]:
    match plan:
        case W4A4Plan():
            return (plan.precision, plan.rank)
        case RotatedPlan():
            return (plan.rotation, plan.activation_bits)
        case W4A16Plan():
            return ()


def with_steps(
    report: BenchReport, precisions: Sequence[Precision], *, settings: BenchSettings
) -> BenchReport:
    """`report` with a step of a FLUX.1-shaped transformer: the whole of it on a GPU, one block of either kind on a CPU.
    Raises EnvironmentLacksError without the kernels or the CPU engine."""
    device = settings.device
    if device.type == "cpu":
        if lack := lack_of_engine():
            raise EnvironmentLacksError(
                f"a step on a CPU needs svdq's engine: {lack.message}", hint=lack.hint, kind=lack.kind
            )
        how = StepSettings(
            *(FLUX1_DEV_BLOCKS, device),
            seconds=settings.seconds_per_row,
            on_engine=True,
            own_processes=True,
        )
    elif lack := lack_of_kernels(device):
        raise EnvironmentLacksError(
            f"a whole step needs the CUDA kernels: {lack}", hint="leave out --step, or see svdq doctor"
        )
    else:
        how = StepSettings(FLUX1_DEV_STEP, device)
    steps = tuple(step_rows(how, arithmetics(precisions, device)))
    rows = [_step_as_row(step, how) for step in steps] if device.type == "cpu" else []
    return replace(report, rows=(*report.rows, *rows), steps=steps)


def _step_as_row(step: StepRow, how: StepSettings) -> BenchRow:
    """A step among the rows of layers, M its tokens, K and N its width. Its error is no one operation's."""
    tokens, width = how.shape.image_tokens + how.shape.text_tokens, how.shape.width
    return BenchRow(
        layer=how.shape.name,
        op="transformer-step",
        mode="torch" if step.rank is None else FUSED,
        precision=step.precision,
        m=tokens,
        k=width,
        n=width,
        rank=step.rank,
        us=step.us,
        tflops=how.shape.operations / step.us.median / 1e6,
        baseline=SHORT[torch.bfloat16],
        ratio=step.ratio,
        branch_cost=None,
        floor_us=None,
        relative_error=None,
        exactness="random weights; the exactness of each layer is that of its own rows",
    )


# ------------------------------------------------------------------------------------------ measuring


def _report(cases: Sequence[Case], settings: BenchSettings, observe: Observer) -> BenchReport:
    started = time.monotonic()
    busy = load_average() if settings.device.type == "cpu" else None
    observe(Event("start", "bench", 0, len(cases)))
    rows: list[BenchRow] = []
    lacking: dict[str, str] = {}  # baselines that fail here, and why
    # shape -> medians of what its ratios refer to, by the baselines' names
    baselines: dict[tuple[int, int, int], dict[str, float]] = {}
    for done, case in enumerate(cases, start=1):
        linear = case.linear
        shape = (case.m, linear.in_features, linear.out_features)
        x = random_numbers(settings.seed, case.m, linear.in_features).to(settings.device)
        if shape not in baselines:
            medians = baselines.setdefault(shape, {})
            for dtype, operation in _baselines(case, settings):
                (row,) = measured_rows(case, (operation,), x, settings, medians)
                medians[baseline_name(dtype, settings.device)] = row.us.median
                rows.append(row)
            rows.extend(_other_rows(case, x, settings, baselines[shape], lacking))
        for operations in _operations(case, settings):
            for row in measured_rows(case, operations, x, settings, baselines[shape]):
                rows += [row, *_beside_others(row, baselines[shape])]
        observe(Event("advance", "bench", done, len(cases), linear.name, time.monotonic() - started))
    observe(Event("end", "bench", len(cases), len(cases), seconds=time.monotonic() - started))
    return BenchReport(device_facts(settings.device), tuple(rows), _notes(settings, busy, lacking, rows))


def _beside_others(row: BenchRow, medians: Mapping[str, float]) -> Iterator[BenchRow]:
    """One of our whole layers as a row for each baseline that its own ratio does not refer to."""
    if (row.op, row.mode) != (LINEAR, FUSED):
        return
    for name, median in medians.items():
        if name != row.baseline:
            yield replace(row, baseline=name, ratio=median / row.us.median)


def _baselines(case: Case, settings: BenchSettings) -> Iterator[tuple[torch.dtype, Operation]]:
    """torch's linear with a random weight of this shape."""
    linear = case.linear
    weight = random_weight(settings, linear)
    bias = (
        random_numbers(settings.seed + 2, 1, linear.out_features)[0].to(settings.device)
        if linear.bias
        else None
    )
    for dtype in BASELINES[settings.device.type]:
        yield dtype, torch_linear(weight, bias, dtype)


def _other_rows(
    case: Case, x: Tensor, settings: BenchSettings, baselines: Mapping[str, float], lacking: dict[str, str]
) -> Iterator[BenchRow]:
    """What others offer. One that fails here is not a fault of ours: `lacking` keeps its reason for the notes."""
    weight = random_weight(settings, case.linear)
    others = gpu_baselines(case.m) if settings.device.type == "cuda" else cpu_baselines(case.m)
    for name, make in others:
        try:
            yield from measured_rows(case, (make(weight),), x, settings, baselines)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            lacking[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _operations(case: Case, settings: BenchSettings) -> Iterator[tuple[Operation, ...]]:
    """The operations to measure, those together that take turns: on the kernels where they run, on the CPU engine, else
    on the reference backend."""
    on_kernels = lack_of_kernels(settings.device) is None
    for found in case.solve():
        solution = on_device(found, settings.device)
        if on_kernels and not isinstance(solution, RotatedSolution):
            yield from ((each,) for each in kernel_operations(solution, case.m))
            if _has_hopper_modes(solution, settings.device):
                yield from ((each,) for each in hopper_operations(solution, case.m))
            continue
        yield (reference_linear(solution),)
        if (
            settings.device.type == "cpu"
            and lack_of_engine() is None
            and cpu_unsupported_reason(solution) is None
        ):
            yield from cpu_operations(solution, case.m)
            continue
        if isinstance(solution, W4A4Solution) and solution.up.shape[1] > 0:
            yield (reference_linear(without_branch(solution)),)


def _has_hopper_modes(solution: LayerSolution, device: torch.device) -> TypeGuard[W4A4Solution]:
    modes = cuda_device(device).architecture.hopper_modes
    return modes and isinstance(solution, W4A4Solution) and hopper_reason(solution) is None


# ------------------------------------------------------------------------------------------ layers to measure


def _require_rank(rank: int, shapes: ShapeSet) -> None:
    most = min(min(shape.k, shape.n) for shape in shapes.shapes if shape.role == "w4a4")
    if rank % RANK_STEP or not 0 <= rank <= most:
        raise UsageError(
            f"--rank {rank}: not a rank that these layers can have",
            hint=f"give a multiple of {RANK_STEP} from 0 to {most}",
        )


def _notes(
    settings: BenchSettings, busy: float | None, lacking: Mapping[str, str], rows: Sequence[BenchRow]
) -> tuple[str, ...]:
    notes = [
        _where(settings.device),
        "us: the median. spread: from the 10th to the 90th percentile, over the median. TFLOP/s counts 2 M K N.",
        "ratio: the baseline's median over the row's, so above 1 is faster.",
        "error: against the same operation in float64, so it measures arithmetic. svdq eval measures "
        "what 4 bits cost in quality.",
    ]
    if any(row.op.startswith(ROTATED) for row in rows):
        notes.append(
            f"{ROTATED}: {NO_ROTATION}, so these are figures of the reference backend on any device. ComfyUI runs such "
            "layers on kernels of its own."
        )
    if settings.device.type == "cuda":
        speed = settings.bytes_per_us / 1e6
        notes += [f"floor: the fewest bytes that must move, over the measured copy speed, {speed:.2f} TB/s."]
        notes += [f"not measured: {name}: {reason}" for name, reason in lacking.items()]
    cores = os.cpu_count() or 1
    if busy is not None and busy > BUSY * cores:
        notes.insert(
            1,
            f"The load average was {busy:.1f} on {cores} cores when this started: other work makes times longer "
            "and less even.",
        )
    return tuple(notes)


def _where(device: torch.device) -> str:
    if device.type == "cpu" and lack_of_engine() is None:
        return (
            "fused: the whole layer on svdq's CPU engine. no-branch: without its low-rank branch. unfused-branch: the "
            "branch as separate torch operations. These three take turns, and what a branch adds is the "
            "median over calls next to each other. These figures say nothing about speed on a GPU."
        )
    if device.type == "cpu":
        return (
            "Figures of the reference backend (plain torch) on a CPU. They say nothing about speed on a GPU."
        )
    if lack := lack_of_kernels(device):
        return f"These are figures of the reference backend, plain torch that unpacks to float32: {lack}."
    return (
        "linear: the whole layer. gemm: on an input that is quantized already. kernels + torch branch: the same "
        "without the low-rank branch, which torch adds."
    )
