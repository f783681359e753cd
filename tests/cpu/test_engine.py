"""The CPU engine equals its definition to the bit: on every instruction set, for any shape, batch and number of
threads."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.cpu import engine as cpu
from svdq_cli.cpu.build import find_compiler
from svdq_cli.cpu.instruction_sets import CHOICE, all_here
from svdq_cli.errors import UsageError
from svdq_cli.pack.cpu_panels import unpack_hidden, unpack_row_codes, unpack_row_scales
from svdq_cli.records import Int4, NvFp4, Precision, W4A4Solution
from svdq_cli.runtime.cpu_definition import defined_linear, defined_w4a16, quantized_rows
from svdq_cli.runtime.cpu_fused import (
    CpuW4A4Linear,
    CpuW4A16Linear,
    FeedForwardBesideAttention,
    cpu_linear,
)
from svdq_cli.runtime.cpu_operands import cpu_unsupported_reason, pack_cpu
from svdq_cli.runtime.cpu_selftest import MOST, engine_cases
from svdq_cli.runtime.kernel_linear import FusedFeedForward, fused_feed_forward
from svdq_cli.runtime.linear import w4a4_exact, w4a4_forward
from tests.runtime.test_fused import activations, assert_same_numbers, random_w4a4, random_w4a16

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
ISAS = [each.name for each in all_here()]
DTYPES = (torch.bfloat16, torch.float16)
PRECISIONS = [pytest.param(Int4(), id="int4"), pytest.param(NvFp4(), id="nvfp4")]


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Layers run on that instruction set, chosen as a user does."""
    monkeypatch.setenv(CHOICE, request.param)
    cpu.engine.cache_clear()
    yield request.param
    cpu.engine.cache_clear()


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_layers(count: int, seed: int = 0) -> Iterator[tuple[W4A4Solution, Tensor, int | None]]:
    """Layers of all kinds, inputs, and from where on these are quantized without a sign."""
    draw = random.Random(seed)
    for _ in range(count):
        precision = draw.choice([Int4(), NvFp4()])
        k = draw.choice([64, 128, 192, 320, 576]) if isinstance(precision, Int4) else 16 * draw.randint(1, 40)
        solution = random_w4a4(
            precision,
            n=draw.randint(1, 90),
            k=k,
            rank=draw.choice([0, 1, 16, 20, 33]),
            dtype=draw.choice(DTYPES),
        )
        if draw.random() < 0.3:
            solution = replace(solution, bias=None)
        unsigned_from = (
            64 * draw.randint(0, k // 64 - 1) if isinstance(precision, Int4) and draw.random() < 0.4 else None
        )
        x = activations(draw.randint(1, 20), k) * 4 ** draw.randint(-3, 3)
        yield solution, x.to(solution.up.dtype), unsigned_from


# ------------------------------------------------------------------------------------------ numbers


@pytest.fixture(scope="module")
def defined() -> list[tuple[W4A4Solution, Tensor, int | None, Tensor]]:
    """Sixty layers with what the definition makes of their inputs, which is slow."""
    return [
        (solution, x, start, defined_linear(x, solution, unsigned_from=start))
        for solution, x, start in random_layers(60)
    ]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_layers_operators_run_on_the_chosen_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch):
    """Or else the tests below would all be of the best one."""
    ran: list[str] = []

    def spy(name: str) -> None:
        real = getattr(cpu.Engine, name)

        def run(self: cpu.Engine, *tensors: Tensor, **options: object) -> object:
            ran.append(self.isa.name)
            return real(self, *tensors, **options)

        monkeypatch.setattr(cpu.Engine, name, run)

    for name in ("quantize_down", "w4a4_gemm"):
        spy(name)
    cpu_linear(random_w4a4(Int4()))(activations(2, 192))
    assert ran == [isa, isa]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_sixty_random_layers_equal_the_definition_to_the_bit(
    isa: str, defined: list[tuple[W4A4Solution, Tensor, int | None, Tensor]]
):
    for solution, x, unsigned_from, wanted in defined:
        layer = cpu_linear(solution, unsigned_from=unsigned_from)
        assert torch.equal(layer(x), wanted), layer


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_codes_and_scales_are_the_reference_backends(isa: str):
    for solution, x, unsigned_from in random_layers(30, seed=1):
        (m, k), precision = x.shape, solution.plan.precision
        layer = CpuW4A4Linear(solution, unsigned_from=unsigned_from)
        codes, scales, hidden = layer.quantize(x)
        wanted, wanted_scales = quantized_rows(x, solution, unsigned_from)
        times = 1 if isinstance(precision, Int4) else 2
        assert torch.equal(unpack_row_codes(codes)[:m, :k].float(), times * wanted)
        assert torch.equal(unpack_row_scales(scales)[:m, : k // precision.group], wanted_scales)
        exact = F.linear(x.double(), solution.down.double())
        size = F.linear(x.double().abs(), solution.down.double().abs())
        step = 2.0 ** (-8 if x.dtype == torch.bfloat16 else -11)
        # Half a step of the 16-bit result, and what a float32 chain loses
        allowed = step * exact.abs() + size * k * 2.0**-24 + 2.0**-24
        assert ((unpack_hidden(hidden)[:m, : solution.plan.rank].double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 40, 136])
def test_w4a16_layers_equal_the_definition_to_the_bit(isa: str, dtype: torch.dtype, n: int):
    solution = random_w4a16(n=n, dtype=dtype)
    for m in (1, 3, 4, 6):
        x = activations(m, 128, dtype=dtype)
        assert torch.equal(cpu_linear(solution)(x), defined_w4a16(x, solution))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes(isa: str, dtype: torch.dtype):
    found = {f"{case.op} {case.precision} {case.mode}": case.disagreement() for case in engine_cases(dtype)}
    assert all(share <= MOST for share in found.values()), found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_within_one_rounding_of_the_reference_backends(precision: Precision, dtype: torch.dtype):
    solution, x = random_w4a4(precision, n=136, k=1024, dtype=dtype), activations(40, 1024, dtype=dtype)
    found, reference = cpu_linear(solution)(x), w4a4_forward(x, solution)
    exact = w4a4_exact(x, solution)
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    # Where terms cancel, float32's order of summation shows beside a small result
    torch.testing.assert_close(found, reference, rtol=step, atol=2e-3 * step * float(exact.abs().max()))
    assert (found.float() - exact).norm() <= 1.01 * (reference.float() - exact).norm()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_get_the_reference_backends_codes(isa: str, precision: Precision, dtype: torch.dtype):
    """Zeros of both signs, the least and the largest numbers, ties, and values whose quotient is subnormal."""
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    tiny = smallest * 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    solution = random_w4a4(precision, k=128, rank=0, dtype=dtype)
    draw = torch.Generator().manual_seed(5)
    rows = [torch.zeros(128), -torch.zeros(128)]
    for size in (tiny, 3 * tiny, smallest, 2 * smallest, 9 * smallest, 1.0, largest / 4, largest):
        steps = torch.randint(-14, 15, (128,), generator=draw) / 14
        rows += [steps * size, torch.full((128,), size), torch.randn(128, generator=draw).clamp(-1, 1) * size]
    x = torch.stack(rows).to(dtype)
    for smooth in (
        solution.smooth,
        torch.full_like(solution.smooth, 6.0),
        torch.full_like(solution.smooth, 0.3),
    ):
        changed = replace(solution, smooth=smooth)
        finite = torch.isfinite(x / smooth).all(1)
        codes, scales, _ = CpuW4A4Linear(changed).quantize(x)
        wanted, wanted_scales = quantized_rows(x, changed)
        times = 1 if isinstance(precision, Int4) else 2
        assert torch.equal(unpack_row_codes(codes)[: len(x)].float()[finite], times * wanted[finite])
        assert torch.equal(unpack_row_scales(scales)[: len(x)][finite], wanted_scales[finite])
        assert cpu_linear(changed)(x)[~finite].isnan().all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("exponents", [(0, 0), (-3, 125), (90, 121), (-100, -120)])
def test_quotients_of_all_bfloat16_significands_round_as_divisions_do(isa: str, exponents: tuple[int, int]):
    """The engine multiplies by reciprocals. A quotient alone in its group of 64 is that group's scale, times 7."""
    of_x, of_smooth = exponents
    significands = 1 + torch.arange(128) / 128
    solution = random_w4a4(Int4(), n=16, k=64 * 128, rank=0)
    x, smooth = torch.zeros(128, 128, 64), torch.ones(128, 64)
    x[:, :, 5] = (significands * 2.0**of_x)[:, None]
    smooth[:, 5] = significands * 2.0**of_smooth
    changed = replace(solution, smooth=smooth.flatten().bfloat16())
    rows = x.flatten(1).bfloat16()
    codes, scales, _ = CpuW4A4Linear(changed).quantize(rows)
    wanted, wanted_scales = quantized_rows(rows, changed)
    assert torch.equal(unpack_row_codes(codes)[:128].float(), wanted)
    assert torch.equal(unpack_row_scales(scales)[:128], wanted_scales)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_value_that_is_no_number_spoils_its_own_row_only(isa: str, precision: Precision, bad: float):
    solution, x = random_w4a4(precision), activations(9, 192)
    layer = cpu_linear(solution)
    good = layer(x)
    x[4, 70] = bad
    found = layer(x)
    assert found[4].isnan().all()
    assert torch.equal(torch.cat((found[:4], found[5:])), torch.cat((good[:4], good[5:])))


# ------------------------------------------------------------------------------------------ rows, threads, processes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    precision: Precision, with_threads: Callable[[int], None]
):
    first, second = random_w4a4(precision, n=256, k=640), random_w4a4(precision, n=72, k=256)
    layer = FusedFeedForward(CpuW4A4Linear(first), CpuW4A4Linear(second))
    x = activations(100, 640)
    wanted = layer(x)
    for threads, rows in product((1, 2, 3, 5), (1, 5, 6, 7, 64, 99)):
        with_threads(threads)
        assert torch.equal(torch.cat([layer(part) for part in x.split(rows)]), wanted)


def test_other_python_threads_may_call_at_the_same_time(with_threads: Callable[[int], None]):
    from concurrent.futures import ThreadPoolExecutor

    layer, x = cpu_linear(random_w4a4(Int4(), n=256, k=640)), activations(64, 640)
    wanted = layer(x)
    with_threads(2)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(lambda _: layer(x), range(40)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_too():
    """In a process of its own, as what torch's threads do after a fork must not meet the other tests. The result is so
    small that torch compares it on one thread: on several, it hangs after a fork."""
    code = """
import os, torch
from svdq_cli.records import Int4
from svdq_cli.runtime.cpu_fused import cpu_linear
from tests.runtime.test_fused import random_w4a4, activations
torch.set_num_threads(2)
layer, x = cpu_linear(random_w4a4(Int4(), n=512, k=640)), activations(60, 640)
wanted = layer(x)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(layer(x), wanted) for _ in range(3)) else 9)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(layer(x), wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=os.getcwd())


def test_no_rows_give_no_rows():
    for solution in (random_w4a4(Int4()), random_w4a16(k=192)):
        assert cpu_linear(solution)(activations(0, 192)).shape == (0, 136)


# ------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", [0, 20, 32])
def test_a_layer_gives_its_numbers_back(precision: Precision, rank: int, dtype: torch.dtype):
    solution = random_w4a4(
        precision, n=50, k=64 if isinstance(precision, Int4) else 48, rank=rank, dtype=dtype
    )
    names = ("smooth", "down", "up", "codes", "scales", "outer", "bias")
    assert_same_numbers(cpu_linear(solution).solution, solution, *names)
    assert_same_numbers(
        cpu_linear(solution, unsigned_from=0 if rank == 20 else None).solution, solution, *names
    )
    modulation = random_w4a16(dtype=dtype)
    assert_same_numbers(cpu_linear(modulation).solution, modulation, "codes", "scales", "zeros", "bias")


def test_every_outer_scale_of_a_row_is_applied():
    solution = random_w4a4(NvFp4())
    solution = replace(solution, outer=(torch.arange(136) + 1).bfloat16() / 1024)
    x = activations(5, 192)
    assert torch.equal(cpu_linear(solution)(x), defined_linear(x, solution))
    assert_same_numbers(cpu_linear(solution).solution, solution, "outer")


def test_weights_take_no_more_memory_than_in_a_file():
    solution = random_w4a4(Int4(), n=256, k=1024)
    kept = (solution.scales, solution.smooth, solution.down, solution.up, solution.bias)
    stored = solution.codes.numel() // 2 + sum(tensor.nbytes for tensor in kept if tensor is not None)
    assert sum(tensor.nbytes for tensor in cpu_linear(solution).buffers()) <= 1.1 * stored


def test_other_inputs_are_rounded_to_the_checkpoints_dtype_and_back():
    layer, x = cpu_linear(random_w4a4(Int4())), activations(2, 4, 192, dtype=torch.float32)
    found = layer(x)
    assert (found.dtype, found.shape) == (torch.float32, (2, 4, 136))
    assert torch.equal(found, layer(x.bfloat16()).float())
    assert torch.equal(layer(x.half()), layer(x.half().bfloat16()).half())


@pytest.mark.parametrize("unsigned_from", [None, 0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fused_feed_forward_is_its_two_layers_with_torchs_gelu_between(
    precision: Precision, unsigned_from: int | None
):
    if unsigned_from is not None and not isinstance(precision, Int4):
        pytest.skip("only int4 has codes without a sign")
    first, second = random_w4a4(precision, n=192, k=128), random_w4a4(precision, n=128, k=192)
    one, two = cpu_linear(first), cpu_linear(second, unsigned_from=unsigned_from)
    fused = fused_feed_forward(one, two)
    assert fused is not None
    x = activations(9, 128)
    assert torch.equal(fused(x), two(F.gelu(one(x), approximate="tanh")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unsigned_from", [None, 64, 128])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_feed_forward_beside_an_attention_is_its_two_layers_with_torchs_gelu_between(
    precision: Precision, unsigned_from: int | None, dtype: torch.dtype
):
    if unsigned_from is not None and not isinstance(precision, Int4):
        pytest.skip("only int4 has codes without a sign")
    first, second = random_w4a4(precision, n=320, k=192), random_w4a4(precision, n=72, k=448)
    one, two = cpu_linear(first), cpu_linear(second, unsigned_from=unsigned_from)
    assert isinstance(one, CpuW4A4Linear)
    assert isinstance(two, CpuW4A4Linear)
    fused = one.beside_attention(two)
    assert fused is not None
    attention, x = activations(2, 21, 128, dtype=dtype), activations(2, 21, 192, dtype=dtype)
    # The engine's GELU is of the 16-bit number
    inner = F.gelu(one(x).bfloat16(), approximate="tanh").to(dtype)
    assert torch.equal(fused(torch.cat((attention, x), -1)), two(torch.cat((attention, inner), -1)))


def test_some_rows_at_a_time_of_a_feed_forward_are_all_of_its_rows(monkeypatch: pytest.MonkeyPatch):
    one, two = cpu_linear(random_w4a4(Int4(), n=320, k=192)), cpu_linear(random_w4a4(Int4(), n=72, k=448))
    assert isinstance(one, CpuW4A4Linear)
    assert isinstance(two, CpuW4A4Linear)
    last = cpu_linear(random_w4a4(Int4(), n=192, k=320))
    assert isinstance(last, CpuW4A4Linear)
    both = FeedForwardBesideAttention(one, two), FusedFeedForward(one, last)
    inputs = activations(2, 21, 128 + 192), activations(2, 21, 192)
    wanted = [fused(x) for fused, x in zip(both, inputs, strict=True)]
    monkeypatch.setattr("svdq_cli.runtime.cpu_fused.ROWS_AT_ONCE", 12)
    for fused, x, y in zip(both, inputs, wanted, strict=True):
        assert torch.equal(fused(x), y)


def test_only_whole_groups_of_attention_come_before_a_feed_forward():
    one, two = cpu_linear(random_w4a4(NvFp4(), n=320, k=192)), cpu_linear(random_w4a4(NvFp4(), n=72, k=352))
    assert isinstance(one, CpuW4A4Linear)
    assert isinstance(two, CpuW4A4Linear)
    assert one.beside_attention(two) is None


def test_a_layer_takes_another_branch_and_its_own_back():
    for unsigned_from in (None, 64):
        layer, x = cpu_linear(random_w4a4(Int4()), unsigned_from=unsigned_from), activations(5, 192)
        assert isinstance(layer, CpuW4A4Linear)
        before, found = layer(x), layer.branch
        layer.set_branch(replace(found, up=torch.zeros_like(found.up), bias=None))
        assert not torch.equal(layer(x), before)
        layer.set_branch(found)
        assert torch.equal(layer(x), before)


def test_what_the_engine_cannot_run_is_named():
    good = random_w4a4(NvFp4(), n=9, k=48)
    assert cpu_unsupported_reason(good) is None
    bad = replace(good, scales=(-good.scales.float()).to(torch.float8_e4m3fn))
    assert cpu_unsupported_reason(bad) == "a micro scale is negative or not a number"
    with pytest.raises(ValueError, match="layer: a micro scale"):
        pack_cpu(bad)
    modulation = random_w4a16(k=128)
    assert cpu_unsupported_reason(modulation) is None
    assert cpu_unsupported_reason(replace(modulation, codes=modulation.codes[:, :96])) == (
        "in_features 96 is not a multiple of 64"
    )


# ------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_keep_their_contract_with_torch(precision: Precision):
    """Schemas, shapes under torch.compile, and no aliasing, as torch's own checker sees them."""
    first, second = (
        pack_cpu(random_w4a4(precision, n=192, k=128)),
        pack_cpu(random_w4a4(precision, n=128, k=192)),
    )
    name, ops = precision.name, torch.ops.svdq
    tests = ("test_schema", "test_faketensor")
    inputs = (activations(40, 128), first.smooth, first.down)
    torch.library.opcheck(ops.cpu_quantize_down.default, inputs, {"precision": name}, test_utils=tests)
    layer = (first.weight_codes, first.weight_scales, first.up, first.outer, first.bias)
    quantized = ops.cpu_quantize_down(*inputs, precision=name)
    how = {"m": 40, "k": 128, "precision": name}
    torch.library.opcheck(
        ops.cpu_w4a4_gemm.default, (*quantized, *layer), {**how, "n": 192}, test_utils=tests
    )
    torch.library.opcheck(
        ops.cpu_w4a4_gelu_quantize.default,
        (*quantized, *layer, second.smooth, second.down),
        how,
        test_utils=tests,
    )
    modulation = cpu_linear(random_w4a16())
    assert isinstance(modulation, CpuW4A16Linear)
    torch.library.opcheck(
        ops.cpu_w4a16_linear.default,
        (activations(3, 128), modulation.weight_codes, modulation.scales, modulation.bias),
        {"n": 136},
        test_utils=tests,
    )


def test_torch_compile_keeps_the_graph_whole():
    model = nn.Sequential(
        cpu_linear(random_w4a4(Int4(), n=192, k=128)), nn.GELU(), cpu_linear(random_w4a16(n=136, k=192))
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for m in (40, 3, 129):
        x = activations(m, 128)
        assert torch.equal(compiled(x), model(x))


def test_gradients_are_refused_in_words():
    x = activations(3, 192).requires_grad_()
    for solution in (random_w4a4(Int4()), random_w4a16(k=192)):
        with pytest.raises(UsageError, match="a converted layer computes no gradients"):
            cpu_linear(solution)(x)
        with torch.no_grad():
            cpu_linear(solution)(x)


def test_a_fused_feed_forward_refuses_gradients_as_its_layers_do():
    one, two = cpu_linear(random_w4a4(Int4(), n=320, k=192)), cpu_linear(random_w4a4(Int4(), n=72, k=448))
    assert isinstance(one, CpuW4A4Linear)
    assert isinstance(two, CpuW4A4Linear)
    beside = FeedForwardBesideAttention(one, two)
    alone = fused_feed_forward(one, cpu_linear(random_w4a4(Int4(), n=192, k=320)))
    assert alone is not None
    for fused, width in ((alone, 192), (beside, 128 + 192)):
        x = activations(3, width).requires_grad_()
        with pytest.raises(UsageError, match="a converted layer computes no gradients"):
            fused(x)
        with torch.no_grad():
            fused(x)
    with pytest.raises(UsageError, match="a converted layer computes no gradients"):
        beside.joined(activations(3, 128).requires_grad_(), one.quantize(activations(3, 192)))
