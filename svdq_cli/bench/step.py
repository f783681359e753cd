"""One denoising step of a FLUX.1-shaped transformer: time and peak memory in 16 bits and converted, in the same run."""

from __future__ import annotations

import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from svdq_cli.bench.report import StepRow
from svdq_cli.bench.resident import peak_resident_bytes, resident_bytes
from svdq_cli.bench.timing import measure
from svdq_cli.bench.transformer import Attend, FluxShapedTransformer, Role, TransformerShape
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu.launch import cuda_device
from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution, W4A16Plan, W4A16Solution
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear, FeedForwardBesideAttention, cpu_linear
from svdq_cli.runtime.fused import fused_linear
from svdq_cli.runtime.kernel_linear import fused_feed_forward
from svdq_cli.system.allocator import free_tensors_at_once, keep_freed_memory

DTYPE = torch.bfloat16
HEAD_GROUPS = 3  # of a converted single block, whose q, k and v are in memory at a time


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What to run a step on, and for how long to measure each way."""

    shape: TransformerShape
    device: torch.device
    rank: int = 32
    seconds: float = 1.0
    compiled: bool = False  # also under torch.compile, which takes minutes to build
    on_engine: bool = False  # on a CPU: our engine, not the references of the kernels
    own_processes: bool = False  # so that memory is the model's alone


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a step's linear layers compute in."""

    precision: Precision | None = None  # None: 16 bit
    mode: HopperMode | None = None  # of Hopper's own kernels; None: the portable ones

    @property
    def name(self) -> str:
        if self.precision is None:
            return "bfloat16"
        return self.precision.name + (f" hopper {self.mode.label}" if self.mode is not None else "")


def arithmetics(precisions: Sequence[Precision], device: torch.device) -> tuple[Arithmetic, ...]:
    """Every way to run these precisions on a device, Hopper's modes too where it has them; the 16-bit model first."""
    found = [Arithmetic(), *map(Arithmetic, precisions)]
    if Int4() in precisions and device.type == "cuda" and cuda_device(device).architecture.hopper_modes:
        found += [Arithmetic(Int4(), mode) for mode in HopperMode]
    return tuple(found)


def step_rows(settings: StepSettings, models: Sequence[Arithmetic]) -> Iterator[StepRow]:
    """The 16-bit model comes first: ratios refer to its eager step. One model is in memory at a time; with
    `own_processes` each has a process of its own."""
    baseline: StepRow | None = None
    for arithmetic in models:
        rows = _rows_apart if settings.own_processes else _rows_of
        for row in rows(settings, arithmetic):
            baseline = baseline or row
            yield _beside(row, baseline)


def _rows_apart(settings: StepSettings, arithmetic: Arithmetic) -> list[StepRow]:
    """In a process that has done nothing else and gives back what is freed: what the C library kept of other work is
    no model's memory."""
    process = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, mp_context=process, initializer=_begin, initargs=(threads,)) as alone:
        return alone.submit(_rows_of, settings, arithmetic).result()


def _begin(threads: int) -> None:
    free_tensors_at_once()
    torch.set_num_threads(threads)


def _rows_of(settings: StepSettings, arithmetic: Arithmetic) -> list[StepRow]:
    if settings.device.type == "cpu":
        _load_libraries(settings, arithmetic)
    before = resident_bytes()
    model = step_model(settings, arithmetic)
    rows = list(_rows(model, arithmetic.name, settings, before))
    del model
    _forget()
    return rows


def _beside(row: StepRow, baseline: StepRow) -> StepRow:
    memory = baseline.peak_bytes / row.peak_bytes if baseline.peak_bytes and row.peak_bytes else None
    return replace(
        row, ratio=baseline.us.median / row.us.median, memory_ratio=None if row is baseline else memory
    )


@torch.no_grad()
def _rows(model: nn.Module, name: str, settings: StepSettings, before: int) -> Iterator[StepRow]:
    """`before`: bytes that were in memory without the model. Ratios are not known yet."""
    inputs = _inputs(settings)
    for mode, call in _ways(model, inputs, settings):
        peak = _peak_bytes(call, settings.device, before)
        if settings.own_processes:
            keep_freed_memory()  # times are those of a command, which lets the next tensor have what the last one took
        us = measure([call], seconds=settings.seconds, device=settings.device)
        yield StepRow(
            model=settings.shape.name,
            precision=name,
            mode=mode,
            rank=None if name == "bfloat16" else settings.rank,
            us=us,
            ratio=1.0,
            peak_bytes=peak,
            memory_ratio=None,
        )


def _ways(
    model: nn.Module, inputs: tuple[Tensor, ...], settings: StepSettings
) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "eager", lambda: model(*inputs)
    if settings.device.type != "cuda":
        return
    yield "CUDA graph", _captured(model, inputs)
    if settings.compiled:
        faster = torch.compile(model)
        faster(*inputs)
        yield "torch.compile", lambda: faster(*inputs)


def _captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The eager step has run before, so nothing is compiled or loaded here."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*inputs)
    return graph.replay


def _peak_bytes(call: Callable[[], object], device: torch.device, before: int) -> int:
    """Peak bytes of tensors in one step, weights included; on a CPU, what the process takes beyond `before`."""
    if device.type != "cuda":
        call()
        resident_bytes()  # gives back what making the model took
        return peak_resident_bytes(call) - before
    call()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


@torch.no_grad()
def _load_libraries(settings: StepSettings, arithmetic: Arithmetic) -> None:
    """What a first step takes for itself, such as torch's matrix library, is not a model's memory."""
    small = replace(
        settings.shape, width=384, heads=3, inner=512, double=1, single=1, image_tokens=64, text_tokens=16
    )
    how = replace(settings, shape=small)
    step_model(how, arithmetic)(*_inputs(how))


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _inputs(settings: StepSettings) -> tuple[Tensor, ...]:
    shape, device = settings.shape, settings.device
    draw = torch.Generator(device).manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, shape.width, generator=draw, device=device, dtype=DTYPE)

    tokens = shape.image_tokens + shape.text_tokens
    angles = torch.rand(
        tokens, shape.width // shape.heads // 2, generator=draw, device=device, dtype=torch.float32
    )
    return rows(shape.image_tokens), rows(shape.text_tokens), rows(1), angles


# ------------------------------------------------------------------------------------------ random models


def step_model(settings: StepSettings, arithmetic: Arithmetic) -> nn.Module:
    device = settings.device
    on_kernels = cpu_linear if settings.on_engine else fused_linear

    def linear(k: int, n: int, role: Role) -> nn.Module:
        if arithmetic.precision is None:
            return _sixteen_bit(k, n, device)
        if role == "w4a16":
            return on_kernels(random_w4a16(k, n, device))
        solution = random_w4a4(k, n, settings.rank, arithmetic.precision, device)
        if arithmetic.mode is None:
            return on_kernels(solution)
        return HopperW4A4Linear(solution, arithmetic.mode)

    def feed_forward(width: int, inner: int) -> nn.Module:
        first, second = linear(width, inner, "w4a4"), linear(inner, width, "w4a4")
        return fused_feed_forward(first, second) or nn.Sequential(first, nn.GELU(approximate="tanh"), second)

    def single(width: int, inner: int) -> nn.Module:
        assert arithmetic.precision is not None
        groups = math.gcd(HEAD_GROUPS, settings.shape.heads)
        return OnEngine(width, inner, settings.rank, arithmetic.precision, groups)

    converted = settings.on_engine and arithmetic.precision is not None
    model = FluxShapedTransformer(settings.shape, linear, feed_forward, single if converted else None)
    return model.eval().requires_grad_(False)


class OnEngine(nn.Module):
    """A single block as a converted model runs it on the CPU engine: q, k, v, and the MLP's first
    layer, which read one quantized input; the MLP's activation is never written."""

    def __init__(self, width: int, inner: int, rank: int, precision: Precision, groups: int) -> None:
        super().__init__()
        cpu = torch.device("cpu")
        first = random_w4a4(width, 3 * width + inner, rank, precision, cpu)
        qkv = torch.arange(3 * width).unflatten(0, (3, groups, -1))
        self.qkv = [CpuW4A4Linear(rows_of(first, qkv[:, group].flatten())) for group in range(groups)]
        self.registered = nn.ModuleList(self.qkv)
        self.rest = FeedForwardBesideAttention(
            CpuW4A4Linear(rows_of(first, torch.arange(3 * width, 3 * width + inner))),
            CpuW4A4Linear(random_w4a4(width + inner, width, rank, precision, cpu)),
        )

    def forward(self, read: Callable[[], Tensor], attend: Attend) -> Tensor:
        """(M, K) tokens of the stream -> (M, K)."""
        x = read()
        m, quantized = x.shape[0], self.rest.first.quantize(x)
        del x
        mixed = torch.cat([attend(some.multiply(quantized, m)) for some in self.qkv], -1)
        return self.rest.joined(mixed, quantized)


def rows_of(solution: W4A4Solution, rows: Tensor) -> W4A4Solution:
    """Some out features of a layer, by their numbers (n,)."""
    codes = solution.codes[rows]
    linear = replace(solution.plan.linear, out_features=codes.shape[0])
    return replace(
        solution,
        plan=replace(solution.plan, linear=linear),
        up=solution.up[rows],
        codes=codes,
        scales=solution.scales[rows],
        bias=None if solution.bias is None else solution.bias[rows],
    )


def _sixteen_bit(k: int, n: int, device: torch.device) -> nn.Linear:
    layer = nn.Linear(k, n, device=device, dtype=DTYPE)
    nn.init.normal_(layer.weight, std=k**-0.5)
    return layer


def random_w4a4(k: int, n: int, rank: int, precision: Precision, device: torch.device) -> W4A4Solution:
    """Any codes, and scales that keep a result as large as its input. Nothing is solved."""
    plan = W4A4Plan(Linear("random", k, n, bias=True), precision, rank)
    size = k**-0.5
    match precision:
        case Int4():
            codes = torch.randint(-8, 8, (n, k), device=device, dtype=torch.int8)
            scales, outer = torch.full((n, k // 64), size / 4, device=device, dtype=DTYPE), None
        case NvFp4():
            codes = torch.randint(0, 16, (n, k), device=device, dtype=torch.int8)
            scales = torch.ones(n, k // 16, device=device, dtype=torch.float32).to(torch.float8_e4m3fn)
            outer = torch.full((1,), size / 3, device=device, dtype=DTYPE)
    return W4A4Solution(
        plan=plan,
        smooth=torch.ones(k, device=device, dtype=DTYPE),
        down=torch.randn(rank, k, device=device, dtype=DTYPE) * size,
        up=torch.randn(n, rank, device=device, dtype=DTYPE) / 16,
        codes=codes,
        scales=scales,
        outer=outer,
        bias=torch.zeros(n, device=device, dtype=DTYPE),
    )


def random_w4a16(k: int, n: int, device: torch.device) -> W4A16Solution:
    """A W4A16 layer of random weights, made as in `random_w4a4`."""
    scales = torch.full((n, k // 64), k**-0.5 / 4, device=device, dtype=DTYPE)
    codes = torch.randint(0, 15, (n, k), device=device, dtype=torch.uint8)
    bias = torch.zeros(n, device=device, dtype=DTYPE)
    return W4A16Solution(W4A16Plan(Linear("random", k, n, bias=True)), codes, scales, -7 * scales, bias)
