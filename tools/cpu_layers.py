"""The CPU engine on random layers: against the reference backend, and against itself on other numbers of threads.

    python -m tools.cpu_layers [--layers 10000] [--repeats 1000] [--seed 0]

Layers of any shape, precision, rank and dtype, with inputs of any size. Codes and scales must be the reference's.
Results, which the reference sums in another order, must be its number or the next one of the 16-bit dtype, or be no
further off than sums in another order may be. Every repeat must have the bits of one thread. Exits with 1 where one of
this is not so. Takes two minutes; $SVDQ_CPU_ISA names another instruction set.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from svdq_cli.cpu.engine import engine
from svdq_cli.pack.cpu_panels import unpack_row_codes, unpack_row_scales
from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution
from svdq_cli.runtime.cpu_definition import quantized_rows
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear
from svdq_cli.runtime.linear import w4a4_exact, w4a4_forward
from svdq_cli.runtime.naive import naive_solution

THREADS = (2, 3, 4, 5, 7, 8)
SUMS = 2.0**-18  # of a row's largest result: what float32 sums of some hundred terms may lose
LARGE = 256  # rows and out features of what is repeated, so that all threads have work


def random_layer(
    draw: random.Random, numbers: torch.Generator, *, most_rows: int = 20, most_columns: int = 90
) -> tuple[W4A4Solution, Tensor, int | None]:
    """A layer, an input (M, K) in its dtype, and from which channel on that is quantized without a sign."""
    precision: Precision = draw.choice((Int4(), NvFp4()))
    dtype = draw.choice((torch.bfloat16, torch.float16))
    m, n, rank = (
        draw.randint(1, most_rows),
        draw.randint(1, most_columns),
        draw.choice((0, 1, 16, 20, 32, 33)),
    )
    k = 64 * draw.randint(1, 10) if isinstance(precision, Int4) else 16 * draw.randint(1, 40)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers)

    plan = W4A4Plan(Linear("random", k, n, bias=True), precision, rank)
    bias = normal(n) if draw.random() < 0.7 else None
    naive = naive_solution(
        replace(plan, linear=Linear("random", k, n, bias is not None)), normal(n, k) / k**0.5, bias, dtype
    )
    solution = replace(
        naive,
        plan=replace(plan, linear=naive.plan.linear),
        smooth=(torch.rand(k, generator=numbers) + 0.5).to(dtype),
        down=(normal(rank, k) / k**0.5).to(dtype),
        up=(normal(n, rank) * 0.1).to(dtype),
    )
    without_sign = isinstance(precision, Int4) and draw.random() < 0.4
    start = 64 * draw.randint(0, k // 64 - 1) if without_sign else None
    return solution, (normal(m, k) * 4.0 ** draw.randint(-3, 3)).to(dtype), start


def compared(solution: W4A4Solution, x: Tensor, unsigned_from: int | None) -> Counter[str]:
    """How many numbers of a layer are the reference's, and how many are not."""
    layer = CpuW4A4Linear(solution, unsigned_from=unsigned_from)
    (m, k), precision = x.shape, solution.plan.precision
    codes, scales, _ = layer.quantize(x)
    wanted_codes, wanted_scales = quantized_rows(x, solution, unsigned_from)
    times = 1 if isinstance(precision, Int4) else 2
    other_codes = unpack_row_codes(codes)[:m, :k].float() != times * wanted_codes
    other_scales = unpack_row_scales(scales)[:m, : k // precision.group] != wanted_scales
    found, wanted = layer(x), w4a4_forward(x, solution, unsigned_from=unsigned_from)
    steps = (_place(found) - _place(wanted)).abs()
    near = (found.float() - wanted.float()).abs() <= _allowed(solution, x, unsigned_from)
    return Counter(
        layers=1,
        results=found.numel(),
        other_codes=int(other_codes.sum()),
        other_scales=int(other_scales.sum()),
        next_number=int((steps == 1).sum()),
        sums_that_cancel=int(((steps > 1) & near).sum()),
        further=int(((steps > 1) & ~near).sum()),
    )


def _allowed(solution: W4A4Solution, x: Tensor, unsigned_from: int | None) -> Tensor:
    """How far two orders of summation may lie apart: float32's own error, one number of the hidden vector that rounds
    the other way, and the rounding of the result. (M, N)."""
    exact, step = w4a4_exact(x, solution, unsigned_from=unsigned_from), torch.finfo(x.dtype).eps
    allowed = SUMS * exact.abs().amax(1, keepdim=True) + step * exact.abs()
    if solution.up.shape[1]:
        hidden = x.float() @ solution.down.float().T
        allowed = allowed + step * (hidden.abs()[:, None] * solution.up.float().abs()).amax(-1)
    return allowed


def _place(numbers: Tensor) -> Tensor:
    """Where 16-bit numbers stand in the order of all: neighbors differ by 1, and both zeros are one."""
    bits = numbers.view(torch.int16).int()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFF))


def repeats_that_differ(draw: random.Random, numbers: torch.Generator, repeats: int) -> int:
    """Calls on other numbers of threads, ten of each layer, that have not the bits of one thread."""
    differ = 0
    for done in range(repeats):
        if done % 10 == 0:
            solution, x, start = random_layer(draw, numbers, most_rows=LARGE, most_columns=LARGE)
            layer = CpuW4A4Linear(solution, unsigned_from=start)
            torch.set_num_threads(1)
            wanted = layer(x)
        torch.set_num_threads(draw.choice(THREADS))
        differ += not torch.equal(layer(x), wanted)
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, numbers = random.Random(given.seed), torch.Generator().manual_seed(given.seed)
    found: Counter[str] = Counter()
    with torch.no_grad():
        for _ in range(given.layers):
            found += compared(*random_layer(draw, numbers))
        differ = repeats_that_differ(draw, numbers, given.repeats)
    print(f"engine {engine().isa.name}: {found['layers']} random layers, {found['results']} results")
    print(f"other codes than the reference's: {found['other_codes']}, other scales: {found['other_scales']}")
    print(
        f"results that are the next 16-bit number: {found['next_number']}, "
        f"in which float32 sums cancel: {found['sums_that_cancel']}, further off: {found['further']}"
    )
    print(
        f"{given.repeats} calls on {THREADS[0]} to {THREADS[-1]} threads, with other bits than one thread's: {differ}"
    )
    if found["other_codes"] or found["other_scales"] or found["further"] or differ:
        sys.exit(1)


if __name__ == "__main__":
    main()
