"""A second's proof that the CPU engine runs here: every operation, precision and mode against its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.cpu.engine import engine
from svdq_cli.pack.cpu_panels import unpack_row_codes, unpack_row_scales
from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.runtime.cpu_definition import defined_linear, defined_w4a16, exact_attention, quantized_rows
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear, cpu_linear
from svdq_cli.runtime.kernel_linear import FusedFeedForward
from svdq_cli.runtime.sample_layers import draw, sample_w4a4, sample_w4a16

M, K, N, INNER = 13, 192, 72, 128  # two blocks of rows and one row; a panel that is half empty
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
    solution, x = sample_w4a4(precision, dtype, k=K, n=N), _rows(dtype)
    codes, scales, _ = CpuW4A4Linear(solution, unsigned_from=unsigned_from).quantize(x)
    wanted, wanted_scales = quantized_rows(x, solution, unsigned_from)
    times = 1 if isinstance(precision, Int4) else 2
    return max(
        _different(unpack_row_codes(codes)[:M].float(), times * wanted),
        _different(unpack_row_scales(scales)[:M], wanted_scales),
    )


def _linear(precision: Precision, dtype: torch.dtype, unsigned_from: int | None) -> float:
    solution, x = sample_w4a4(precision, dtype, k=K, n=N), _rows(dtype)
    wanted = defined_linear(x, solution, unsigned_from=unsigned_from)
    return _different(cpu_linear(solution, unsigned_from=unsigned_from)(x), wanted)


def _fused(precision: Precision, dtype: torch.dtype) -> float:
    first = sample_w4a4(precision, dtype, k=K, n=INNER)
    second = sample_w4a4(precision, dtype, k=INNER, n=N)
    x = _rows(dtype)
    between = F.gelu(defined_linear(x, first), approximate="tanh")
    found = FusedFeedForward(CpuW4A4Linear(first), CpuW4A4Linear(second))(x)
    return _different(found, defined_linear(between, second))


def _w4a16(dtype: torch.dtype) -> float:
    solution = sample_w4a16(dtype, k=K, n=N)
    x = _rows(dtype)[:3]
    return _different(cpu_linear(solution)(x), defined_w4a16(x, solution))


def _attention() -> float:
    """The share of numbers that are further off than their rounding."""
    q, k, v = (draw(seed, 1, 2, rows, 40).bfloat16() for seed, rows in ((8, M), (9, N), (10, N)))
    bias = torch.zeros(1, N, dtype=torch.float32).masked_fill_(torch.arange(N) % 5 == 0, -torch.inf)
    found = torch.ops.svdq.cpu_attention(q, k, v, bias, scale=0.5)
    wanted, most = exact_attention(q, k, v, bias, scale=0.5)
    return float((~((found - wanted).abs() <= most)).float().mean())


def _rows(dtype: torch.dtype) -> Tensor:
    return draw(0, M, K).to(dtype)


def _different(found: Tensor, wanted: Tensor) -> float:
    return float((found != wanted).float().mean())
