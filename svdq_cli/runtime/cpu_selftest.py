"""A second's proof that the CPU engine runs here: every operation, precision and mode against its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.cpu.engine import engine
from svdq_cli.pack.cpu_panels import unpack_row_codes, unpack_row_scales
from svdq_cli.records import (
    Int4,
    Linear,
    NvFp4,
    Precision,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.runtime.cpu_definition import defined_linear, defined_w4a16, exact_attention, quantized_rows
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear, cpu_linear
from svdq_cli.runtime.kernel_linear import FusedFeedForward
from svdq_cli.runtime.naive import naive_solution

M, K, N, INNER, RANK = 13, 192, 72, 128, 32  # two blocks of rows and one row; a panel that is half empty
# The definition's fmas round twice in 2^-29 of cases
MOST = 1e-3


@dataclass(frozen=True, slots=True)
class EngineCase:
    """One operation in one precision and mode."""

    op: str
    precision: str
    mode: str
    disagreement: Callable[[], float]  # share of numbers that are not the definition's


def engine_cases(dtype: torch.dtype) -> Iterator[EngineCase]:
    """Everything the engine offers, in the 16-bit dtype of a checkpoint."""
    for precision in (Int4(), NvFp4()):
        for unsigned_from in (None, 64) if isinstance(precision, Int4) else (None,):
            mode = "signed" if unsigned_from is None else "signed and unsigned"
            for op, disagreement in (("quantize_down", _quantize), ("w4a4_linear", _linear)):
                yield EngineCase(
                    *(op, precision.name, mode),
                    lambda run=disagreement, p=precision, start=unsigned_from: run(p, dtype, start),
                )
        yield EngineCase("w4a4_gelu_quantize", precision.name, "-", lambda p=precision: _fused(p, dtype))
    yield EngineCase("w4a16_linear", "int4", "-", lambda: _w4a16(dtype))
    if engine().has_attention:
        yield EngineCase("attention", "bfloat16", "-", _attention)


def _quantize(precision: Precision, dtype: torch.dtype, unsigned_from: int | None) -> float:
    solution, x = _solution(precision, dtype), _rows(dtype)
    codes, scales, _ = CpuW4A4Linear(solution, unsigned_from=unsigned_from).quantize(x)
    wanted, wanted_scales = quantized_rows(x, solution, unsigned_from)
    times = 1 if isinstance(precision, Int4) else 2
    return max(
        _different(unpack_row_codes(codes)[:M].float(), times * wanted),
        _different(unpack_row_scales(scales)[:M], wanted_scales),
    )


def _linear(precision: Precision, dtype: torch.dtype, unsigned_from: int | None) -> float:
    solution, x = _solution(precision, dtype), _rows(dtype)
    wanted = defined_linear(x, solution, unsigned_from=unsigned_from)
    return _different(cpu_linear(solution, unsigned_from=unsigned_from)(x), wanted)


def _fused(precision: Precision, dtype: torch.dtype) -> float:
    first, second = _solution(precision, dtype, n=INNER), _solution(precision, dtype, k=INNER)
    x = _rows(dtype)
    between = F.gelu(defined_linear(x, first), approximate="tanh")
    found = FusedFeedForward(CpuW4A4Linear(first), CpuW4A4Linear(second))(x)
    return _different(found, defined_linear(between, second))


def _w4a16(dtype: torch.dtype) -> float:
    scales = (_draw(6, N, K // 64).abs() / 100).to(dtype)
    codes = torch.arange(N * K).reshape(N, K).remainder(13).to(torch.uint8)
    plan = W4A16Plan(Linear("self-test", K, N, bias=True))
    solution = W4A16Solution(plan, codes, scales, -7 * scales, _draw(7, N).to(dtype))
    x = _rows(dtype)[:3]
    return _different(cpu_linear(solution)(x), defined_w4a16(x, solution))


def _attention() -> float:
    """The share of numbers that are further off than their rounding."""
    q, k, v = (_draw(seed, 1, 2, rows, 40).bfloat16() for seed, rows in ((8, M), (9, N), (10, N)))
    bias = torch.zeros(1, N).masked_fill_(torch.arange(N) % 5 == 0, -torch.inf)
    found = torch.ops.svdq.cpu_attention(q, k, v, bias, scale=0.5)
    wanted, most = exact_attention(q, k, v, bias, scale=0.5)
    return float((~((found - wanted).abs() <= most)).float().mean())


def _solution(precision: Precision, dtype: torch.dtype, *, n: int = N, k: int = K) -> W4A4Solution:
    plan = W4A4Plan(Linear("self-test", k, n, bias=True), precision, RANK)
    naive = naive_solution(plan, _draw(1, n, k) / k**0.5, _draw(2, n), dtype)
    return replace(
        naive,
        plan=plan,
        smooth=(_draw(3, k).abs() + 0.5).to(dtype),
        down=(_draw(4, RANK, k) / k**0.5).to(dtype),
        up=(_draw(5, n, RANK) / 8).to(dtype),
    )


def _rows(dtype: torch.dtype) -> Tensor:
    return _draw(0, M, K).to(dtype)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _different(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).float().mean())
