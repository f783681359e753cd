"""What solving one shared input costs: operations by kind, and the memory that is alive at the peak.

Counts follow the code of this room step by step; N out features of all layers of the input, n of its largest layer,
K in features, M calibration rows, R rank. Tests hold them against what torch allocates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdq_cli.records import (
    HELD_OUT,
    Int4,
    LayerPlan,
    NvFp4,
    Precision,
    RotatedPlan,
    SharedInput,
    SolveSettings,
    W4A4Plan,
    W4A16Plan,
)
from svdq_cli.solve import refine
from svdq_cli.solve.forward import MEASURED_ROWS, ROWS_AT_ONCE
from svdq_cli.solve.improve import LEAST_ROWS
from svdq_cli.solve.low_rank import OVERSAMPLE, POWER_ITERATIONS, SEARCH_POWER_ITERATIONS
from svdq_cli.solve.quantizers import BLOCK, NVFP4_SHARES
from svdq_cli.solve.rotated import ROW_FACTORS
from svdq_cli.solve.smoothing_methods import SEARCH_OUTPUTS, SEARCH_ROWS, SMOOTHING_METHODS
from svdq_cli.solve.steps import STEPS, LayerSizes, StepMatrices, steps_for
from svdq_cli.solve.work import NVFP4_ROUNDING, Shapes, Work, split_work


def solve_work(
    shared: SharedInput, plans: Mapping[str, LayerPlan], settings: SolveSettings, *, rows: int
) -> Work:
    """All steps of `solve_input`. `rows`: calibration rows, 0 for data-free."""
    total = Work()
    branches = [
        [plan for name in part if isinstance(plan := plans[name], W4A4Plan) and not plan.curve]
        for part in shared.branches
    ]
    branches = [members for members in branches if members]
    if branches:
        width = branches[0][0].linear.in_features
        shapes = [(sum(p.linear.out_features for p in members), members[0].rank) for members in branches]
        layers = [plan.linear.out_features for members in branches for plan in members]
        total += _w4a4_work(shapes, layers, width, settings, rows, branches[0][0].precision)
    for name in shared.layers:
        if isinstance(plan := plans[name], W4A16Plan):
            total += _w4a16_work(plan, settings, rows)
    rotated = [plan.linear for name in shared.layers if isinstance(plan := plans[name], RotatedPlan)]
    if rotated:
        total += _rotated_work(
            sum(linear.out_features for linear in rotated), rotated[0].in_features, settings, rows
        )
    return total


def _rotated_work(n: int, width: int, settings: SolveSettings, rows: int) -> Work:
    """Rounded to nearest with a search of every row's scale, then by GPTQ."""
    total = Work(
        matmul=2 * RotatedPlan.rotations[0] * n * width, quantized=len(ROW_FACTORS) * n * width, calls=200
    )
    total += Work(compared=n * width) + _report(n, width, rows)
    if rows >= LEAST_ROWS and "gptq" in settings.steps:
        no_branch = LayerSizes([(n, 0)], width, rows - rows // HELD_OUT, Work(), Int4())
        total += STEPS["gptq"].work(no_branch) + _output(n, width, rows // HELD_OUT) * 2
    return total


def _w4a4_work(
    shapes: Shapes,
    layers: Sequence[int],
    width: int,
    settings: SolveSettings,
    rows: int,
    precision: Precision,
) -> Work:
    """`layers`: the outputs of each."""
    n, branched = sum(count for count, _ in shapes), any(rank for _, rank in shapes)
    size = n * width
    nearest = size * (NVFP4_ROUNDING * len(NVFP4_SHARES) if isinstance(precision, NvFp4) else 1)
    report = Work(compared=size, calls=200) + _report(n, width, rows)
    if not rows:
        first = split_work(shapes, width, refine.POWER_ITERATIONS) + Work(quantized=nearest, calls=200)
        more = refine.round_work(shapes, width, precision)
        return first + more * (settings.refinements if branched else 0) + report
    final = split_work(shapes, width, POWER_ITERATIONS) + Work(quantized=nearest, calls=200)
    search = min(rows, SEARCH_ROWS)
    scored = width * sum(min(count, SEARCH_OUTPUTS) for count in layers)
    rounding = scored * (1 + (NVFP4_ROUNDING if isinstance(precision, NvFp4) else 1)) + search * width
    product = Work(matmul=2 * search * scored)
    point = split_work(shapes, width, SEARCH_POWER_ITERATIONS) + Work(quantized=rounding, calls=500)
    points = SMOOTHING_METHODS[settings.smoothing].tried
    total = (point + product) * points + (product if points else Work()) + final + report
    if settings.steps and rows >= LEAST_ROWS:
        judge = rows // HELD_OUT
        train = rows - judge
        total += _output(n, width, judge) * (1 + len(settings.steps))
        sizes = LayerSizes(shapes, width, train, final, precision, settings.refinements)
        for step in steps_for(settings, branched=branched):
            total += STEPS[step].work(sizes)
    return total


def _w4a16_work(plan: W4A16Plan, settings: SolveSettings, rows: int) -> Work:
    n, width = plan.linear.out_features, plan.linear.in_features
    report = Work(compared=n * width) + _report(n, width, rows)
    if rows and "gptq" in settings.steps:
        solved = Work(
            matmul=2 * rows * width**2 + n * width**2,
            gptq=2 * n * width,
            factored=3 * width**3,
            calls=40 * width,
        )
    else:
        solved = Work(quantized=8 * n * width, calls=100)  # five candidates, then fitted
    return solved + report


def _report(n: int, width: int, rows: int) -> Work:
    """The output of the rows that a report's SQNR is taken on."""
    return _output(n, width, min(rows, MEASURED_ROWS)) if rows else Work()


def _output(n: int, width: int, rows: int) -> Work:
    """The exact and the quantized output of rows, and their difference."""
    return Work(matmul=4 * rows * n * width, quantized=rows * width, compared=rows * n)


@dataclass(frozen=True, slots=True)
class Rates:
    """How much of each kind of work a machine does in a second."""

    matmul: float
    sketch: float
    bases: float
    quantized: float
    compared: float
    gptq: float
    factored: float
    learned: float
    calls: float

    def seconds(self, work: Work) -> float:
        return sum(getattr(work, name) / getattr(self, name) for name in self.__dataclass_fields__)


# One core of a server of 2022, rounded. Good for comparing layers with each other, not for telling the time.
NOMINAL = Rates(
    matmul=50e9,
    sketch=20e9,
    bases=15e9,
    quantized=100e6,
    compared=50e6,
    gptq=5e6,
    factored=15e9,
    learned=10e3,
    calls=100e3,
)


# ------------------------------------------------------------------------------------------------- memory


def solve_bytes(
    shared: SharedInput,
    plans: Mapping[str, LayerPlan],
    settings: SolveSettings,
    *,
    rows: int,
    streamed: bool = False,
) -> int:
    """Bytes on the device that are alive at the peak of `solve_input`, its weights and rows included. `streamed`: its
    weights are not there all at once, but each when it is asked for."""
    members = [plans[name] for name in shared.layers]
    k = members[0].linear.in_features
    big = max(plan.linear.out_features for plan in members)
    total = sum(plan.linear.out_features for plan in members)
    branch = max(sum(plans[name].linear.out_features for name in part) for part in shared.branches)
    one = 4 * (big if streamed else total) * k  # weights in float32, while a layer of its own is looked at
    stacked = 0 if streamed else one  # the same, while a copy of them all is
    rank = max((plan.rank for plan in members if isinstance(plan, W4A4Plan)), default=0)
    compared = min(big * k, BLOCK + k)  # weights are compared some rows at a time
    phases = [one + 12 * compared]
    if rows:
        phases.append(one + _output_bytes(big, k, min(rows, ROWS_AT_ONCE)))
    if isinstance(members[0], W4A4Plan):
        factors = 4 * (rank + OVERSAMPLE) * (branch + k)
        if rank == 0:
            # a copy of all weights as one matrix, which is rounded
            phases.append(one + 4 * total * k + _rounding_bytes(members[0].precision, total * k, compared))
        elif rows:
            # the low-rank branch, before there are codes
            phases.append(4 * branch * k + 3 * factors - total * k)
            phases.append(one + 2 * factors + _rounding_bytes(members[0].precision, big * k, compared))
        else:
            held = max(one, 4 * branch * k)
            phases.append(
                held + refine.held_bytes(members[0].precision, branch, k, rank + OVERSAMPLE, compared)
            )
        if rows:
            scored = max(
                sum(min(plans[name].linear.out_features, SEARCH_OUTPUTS) for name in part)
                for part in shared.branches
            )
            point = max(
                2 * factors, _search_bytes(scored, min(big, SEARCH_OUTPUTS), k, min(rows, SEARCH_ROWS))
            )
            phases.append(max(stacked, 4 * branch * k) + factors + point)
    if rows >= LEAST_ROWS:
        precision = members[0].precision if isinstance(members[0], W4A4Plan) else Int4()
        matrices = StepMatrices(total, branch, k, rows, rank, precision, at_once=compared)
        steps = steps_for(settings, branched=rank > 0)
        phases += [stacked + STEPS[step].bytes(matrices) for step in steps]
    return 4 * rows * k + total * k + max(phases)  # rows in float32, codes


def _rounding_bytes(precision: Precision, numbers: int, at_once: int) -> int:
    """The scales, for nvfp4 in float32 too, and what rounding some numbers of the residual takes."""
    match precision:
        case Int4(group=group):
            return 2 * numbers // group + 8 * at_once
        case NvFp4(group=group):
            return 9 * numbers // group + 24 * at_once


def _output_bytes(n: int, k: int, rows: int) -> int:
    """The 4-bit part, and the exact and the approximate output; of these some numbers at a time in float64."""
    outputs = max(16 * rows * n, 8 * rows * n + 24 * min(rows * n, BLOCK))
    return 4 * n * k + max(8 * n * k, outputs + 8 * rows * k)


def _search_bytes(n: int, layer: int, k: int, rows: int) -> int:
    """Bytes of one grid point that `n` outputs score, `layer` of them the largest layer's: their weights, smoothed and
    less the branch, rounded layer by layer; then the lost part of the output."""
    rounded = 12 * n * k + 8 * layer * k + 4 * rows * (n + k)
    return max(rounded, 16 * n * k + 4 * rows * (2 * n + layer + k))


def stored_bytes(
    shared: SharedInput, plans: Mapping[str, LayerPlan], *, itemsize: int, pinned: bool = False
) -> int:
    """The weights as the source stores them. `pinned`: in page-locked memory, which torch gives in powers of two."""
    sizes = [
        itemsize * plans[name].linear.out_features * plans[name].linear.in_features for name in shared.layers
    ]
    return sum(1 << (size - 1).bit_length() if pinned else size for size in sizes)


def packed_bytes(shared: SharedInput, plans: Mapping[str, LayerPlan]) -> int:
    """Bytes of a layer group that is written in the background: its codes, plain and packed."""
    linears = [plans[name].linear for name in shared.layers]
    return sum(3 * linear.out_features * linear.in_features // 2 for linear in linears)


def waiting_bytes(
    shared: SharedInput, plans: Mapping[str, LayerPlan], *, itemsize: int, pinned: bool = False
) -> int:
    """Bytes of host memory in addition to those of `solve_bytes`, with neighbors as large as this input: the next one's
    weights as the source stores them, and the codes of the one before, which are packed and written. Pinned weights
    stay after they are copied, for those that are read next."""
    numbers = sum(plans[name].linear.out_features * plans[name].linear.in_features for name in shared.layers)
    stored = stored_bytes(shared, plans, itemsize=itemsize, pinned=pinned)
    return (2 if pinned else 1) * stored + 3 * numbers
