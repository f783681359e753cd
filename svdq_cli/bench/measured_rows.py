"""Rows of a benchmark: how long an operation takes, and how far its result is from the operation's definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from svdq_cli.bench.cases import BenchSettings, Case
from svdq_cli.bench.operations import NAMES, Operation
from svdq_cli.bench.report import NO_BRANCH, BenchRow, Microseconds
from svdq_cli.bench.timing import Call, cache_bytes, copies_beyond_cache, measure, measure_in_turns, spread
from svdq_cli.errors import InputError

# torch's own linear, the 16-bit model's arithmetic first: a row's ratio refers to it. On a CPU our own layers get a row
# for float32 too, as many CPUs compute bfloat16 more slowly.
BASELINES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
SHORT = {torch.bfloat16: "torch-bf16", torch.float32: "torch-fp32"}  # as CPU rows call a baseline
ERROR_ROWS = 128  # rows of a result do not depend on each other: a sample tells its error


def baseline_name(dtype: torch.dtype, device: torch.device) -> str:
    """What rows call torch's own linear in `dtype`."""
    return SHORT[dtype] if device.type == "cpu" else f"torch linear {NAMES[dtype]}"


@torch.no_grad()
def measured_rows(
    case: Case,
    operations: Sequence[Operation],
    x: Tensor,
    settings: BenchSettings,
    baselines: Mapping[str, float],
) -> list[BenchRow]:
    """A row for each operation. Several on a CPU take turns, call by call, so that a machine that slows down does so
    for all of them, and what a branch costs is told by calls next to each other.

    `x` (M, K) in any dtype. `baselines`: medians by name, the one that ratios refer to first; empty where this row is
    it. Raises InputError for a layer whose results are not finite.
    """
    device, seconds = settings.device, settings.seconds_per_row
    inputs = [x.to(each.dtype) for each in operations]
    pairs = list(zip(operations, inputs, strict=True))
    # The error first: computing it also fills a module's weight cache
    errors = [_relative_error(case.linear.name, each, mine) for each, mine in pairs]
    if len(operations) == 1:
        times = [measure(_turns(*pairs[0], device), seconds=seconds, device=device)]
        costs: list[float | None] = [None]
    else:
        samples = measure_in_turns([_turns(each, mine, device) for each, mine in pairs], seconds=seconds)
        times = [spread(each) for each in samples]
        costs = _costs_of_a_branch(operations, samples)
    return [
        _row(case, *each, settings, baselines) for each in zip(operations, times, errors, costs, strict=True)
    ]


def _costs_of_a_branch(
    operations: Sequence[Operation], samples: Sequence[Sequence[float]]
) -> list[float | None]:
    """By how much of the layer without its branch each operation's calls take longer than that layer's of the same
    round: the median."""
    bare = next((i for i, each in enumerate(operations) if each.mode == NO_BRANCH), None)
    if bare is None:
        return [None] * len(operations)
    return [
        None
        if i == bare
        else median(mine / without - 1.0 for mine, without in zip(each, samples[bare], strict=True))
        for i, each in enumerate(samples)
    ]


def _row(
    case: Case,
    operation: Operation,
    us: Microseconds,
    error: float,
    branch_cost: float | None,
    settings: BenchSettings,
    baselines: Mapping[str, float],
) -> BenchRow:
    linear = case.linear
    own_name = baseline_name(BASELINES[settings.device.type][0], settings.device)
    name = next(iter(baselines), own_name)
    return BenchRow(
        layer=linear.name,
        op=operation.op,
        mode=operation.mode,
        precision=operation.precision,
        m=case.m,
        k=linear.in_features,
        n=linear.out_features,
        rank=operation.rank,
        us=us,
        tflops=2 * case.m * linear.in_features * linear.out_features / us.median / 1e6,
        baseline=name,
        ratio=baselines[name] / us.median if baselines else 1.0,
        branch_cost=branch_cost,
        floor_us=None if operation.least_bytes is None else operation.least_bytes / settings.bytes_per_us,
        relative_error=error,
        exactness=operation.exactness,
    )


def _turns(operation: Operation, x: Tensor, device: torch.device) -> list[Call]:
    """The call on as many copies of input and layer as it takes to leave the cache.

    A layer that is larger than the cache drives itself out of it and is not copied.
    """
    layer, inputs = operation.module, operation.prepare(x)
    layer_bytes = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    count = copies_beyond_cache(layer_bytes + sum(tensor.nbytes for tensor in inputs), device)
    shared = layer_bytes >= cache_bytes(device)

    def call(layer: Callable[..., object], inputs: Sequence[Tensor]) -> Call:
        return lambda: layer(*inputs)

    return [
        call(layer if shared else copy.deepcopy(layer), [tensor.clone() for tensor in inputs])
        for _ in range(count)
    ]


def _relative_error(layer: str, operation: Operation, x: Tensor) -> float:
    """|y - y64| / |y64| on a sample of rows. Raises InputError where the layer's numbers are not finite."""
    count = x.shape[0]
    sample = (
        torch.linspace(0, count - 1, min(count, ERROR_ROWS), device=x.device, dtype=torch.float32)
        .round()
        .long()
    )
    wanted = operation.define(x[sample])
    found = operation.rows_of(operation.module(*operation.prepare(x)))
    error = float((found[sample].double() - wanted).norm() / wanted.norm())
    if not math.isfinite(error):
        raise InputError(
            f"{layer}: {operation.label} returns values that are not finite, or only zeros",
            hint="svdq check shows what is wrong with a checkpoint",
            where=layer,
        )
    return error
