"""Converted linears on the kernels' operators: exact packing, the reference backend's numbers, graphs kept whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from svdq_cli.experimental.hopper.linear import hopper_linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution, W4A16Plan, W4A16Solution
from svdq_cli.runtime.fused import (
    FusedW4A4Linear,
    FusedW4A16Linear,
    SplitLinear,
    fused_linear,
    split_columns,
)
from svdq_cli.runtime.kernel_linear import FusedFeedForward, KernelW4A4Linear, fused_feed_forward
from svdq_cli.runtime.linear import w4a4_exact, w4a4_forward, w4a16_forward
from svdq_cli.runtime.naive import naive_solution
from svdq_cli.runtime.operands import pack_w4a4, pack_w4a16, unpack_w4a4, unpack_w4a16, unsupported_reason
from svdq_cli.runtime.replace import fuse_feed_forwards

CPU = torch.device("cpu")
PRECISIONS = [pytest.param(Int4(), id="int4"), pytest.param(NvFp4(), id="nvfp4")]
ONE_STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # from a number to its neighbor


def random_w4a4(
    precision: Precision, *, n: int = 136, k: int = 192, rank: int = 32, dtype: torch.dtype = torch.bfloat16
) -> W4A4Solution:
    draw = torch.Generator().manual_seed(n + k)
    plan = W4A4Plan(Linear("layer", k, n, bias=True), precision, rank)
    naive = naive_solution(
        plan, torch.randn(n, k, generator=draw) / k**0.5, torch.randn(n, generator=draw), dtype
    )
    return replace(
        naive,
        plan=plan,
        smooth=(torch.rand(k, generator=draw) + 0.5).to(dtype),
        down=(torch.randn(rank, k, generator=draw) / k**0.5).to(dtype),
        up=(torch.randn(n, rank, generator=draw) * 0.1).to(dtype),
    )


def random_w4a16(*, n: int = 136, k: int = 128, dtype: torch.dtype = torch.bfloat16) -> W4A16Solution:
    draw = torch.Generator().manual_seed(2)
    scales = (torch.rand(n, k // 64, generator=draw) * 0.01 + 0.01).to(dtype)
    codes = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8)
    bias = torch.randn(n, generator=draw).to(dtype)
    return W4A16Solution(W4A16Plan(Linear("mod", k, n, bias=True)), codes, scales, -7 * scales, bias)


def activations(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same_numbers(found: object, wanted: object, *names: str) -> None:
    for name in names:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), (
                name
            )


# ------------------------------------------------------------------------------------------ operands


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", [0, 16, 20, 48])
def test_unpacking_a_w4a4_layer_gives_back_its_numbers(precision: Precision, rank: int, dtype: torch.dtype):
    solution = random_w4a4(precision, rank=rank, dtype=dtype)
    found = unpack_w4a4(pack_w4a4(solution), solution.plan)
    assert_same_numbers(found, solution, "smooth", "down", "up", "codes", "scales", "outer", "bias")


def test_outer_scales_of_every_row_come_back():
    solution = random_w4a4(NvFp4())
    solution = replace(solution, outer=(torch.arange(136) + 1).bfloat16() / 1024, bias=None)
    found = unpack_w4a4(pack_w4a4(solution), solution.plan)
    assert_same_numbers(found, solution, "outer", "bias")


def test_every_smoothing_factor_survives_its_reciprocal():
    """All significands and the largest exponents that are accepted."""
    significands = torch.arange(128, 256, dtype=torch.float32) / 128
    for exponent in (-100, -1, 0, 99):
        smooth = (significands * 2.0**exponent).bfloat16()
        solution = replace(random_w4a4(Int4(), k=128), smooth=smooth)
        assert torch.equal(unpack_w4a4(pack_w4a4(solution), solution.plan).smooth, smooth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unpacking_a_w4a16_layer_gives_back_its_numbers(dtype: torch.dtype):
    solution = random_w4a16(dtype=dtype)
    found = unpack_w4a16(pack_w4a16(solution), solution.plan)
    assert_same_numbers(found, solution, "codes", "scales", "zeros", "bias")


def test_what_the_kernels_cannot_run_is_named():
    good = random_w4a4(Int4(), n=128, k=128)
    assert unsupported_reason(good) is None
    assert unsupported_reason(random_w4a4(Int4(), n=132)) == "out_features 132 is not a multiple of 8"
    assert (
        unsupported_reason(replace(good, codes=good.codes[:, :96]))
        == "in_features 96 is not a multiple of 64"
    )
    tiny = replace(good, smooth=good.smooth * 2.0**-110)
    with pytest.raises(ValueError, match="layer: a smoothing factor is outside"):
        pack_w4a4(tiny)


# ------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", [0, 32])
def test_a_fused_w4a4_layer_computes_the_reference_backends_numbers(
    precision: Precision, rank: int, dtype: torch.dtype
):
    solution = random_w4a4(precision, rank=rank, dtype=dtype)
    x = activations(2, 5, 192, dtype=dtype)
    y, reference = fused_linear(solution)(x), w4a4_forward(x, solution)
    assert (y.shape, y.dtype) == (reference.shape, reference.dtype)
    # Float32 sums in another order: now and then the other side of a rounding boundary
    torch.testing.assert_close(y, reference, rtol=ONE_STEP[dtype], atol=1e-5)
    exact = w4a4_exact(x, solution)
    assert (y.float() - exact).norm() <= 2e-3 * exact.norm()


def test_a_fused_w4a16_layer_computes_the_reference_backends_numbers():
    solution = random_w4a16()
    x = activations(3, 128)
    torch.testing.assert_close(
        fused_linear(solution)(x), w4a16_forward(x, solution), rtol=ONE_STEP[torch.bfloat16], atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_inputs_are_rounded_to_the_checkpoints_dtype_and_back(dtype: torch.dtype):
    solution = random_w4a4(Int4())
    x = activations(4, 192).to(dtype)
    assert fused_linear(solution)(x).dtype == dtype


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fused_feed_forward_is_its_two_layers_with_gelu_between(precision: Precision):
    first, second = random_w4a4(precision, n=192, k=128), random_w4a4(precision, n=128, k=192)
    x = activations(9, 128)
    between = nn.functional.gelu(fused_linear(first)(x), approximate="tanh")
    one, two = fused_linear(first), fused_linear(second)
    assert isinstance(one, FusedW4A4Linear)
    assert isinstance(two, FusedW4A4Linear)
    assert torch.equal(FusedFeedForward(one, two)(x), fused_linear(second)(between))


def test_converting_a_fused_layer_to_half_changes_no_number():
    layer = fused_linear(random_w4a4(NvFp4()))
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in layer.named_buffers()}
    for name, tensor in layer.half().named_buffers():
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_a_fused_layer_gives_its_solution_back():
    solution = random_w4a4(Int4())
    layer = fused_linear(solution)
    assert_same_numbers(layer.solution, solution, "codes", "up", "smooth")
    modulation = fused_linear(random_w4a16())
    assert isinstance(modulation, FusedW4A16Linear)
    assert_same_numbers(modulation.solution, random_w4a16(), "codes", "zeros")


# ------------------------------------------------------------------------------------------ behind a GELU


@pytest.mark.parametrize("start", [0, 64])
@pytest.mark.parametrize("mode", [None, HopperMode.EXACT], ids=["portable", "hopper"])
def test_channels_behind_a_gelu_are_quantized_as_the_reference_backend_does(
    start: int, mode: HopperMode | None
):
    solution = random_w4a4(Int4())
    x = activations(33, 192)
    x[:, start:] = nn.functional.gelu(3 * x[:, start:], approximate="tanh")
    layer = behind_gelu(solution, mode, start)
    reference = w4a4_forward(x, solution, unsigned_from=start)
    signed = w4a4_forward(x, solution)
    # The bias holds what the shift adds, rounded once more than in the reference; with a sign the result is another one
    assert (layer(x).float() - reference.float()).norm() <= 4e-3 * reference.float().norm()
    assert (signed.float() - reference.float()).norm() > 2e-2 * reference.float().norm()


def behind_gelu(solution: W4A4Solution, mode: HopperMode | None, start: int) -> nn.Module:
    if mode is None:
        return fused_linear(solution, unsigned_from=start)
    return hopper_linear(solution, mode, unsigned_from=start)


@pytest.mark.parametrize("mode", [None, HopperMode.EXACT], ids=["portable", "hopper"])
def test_a_fused_feed_forward_quantizes_behind_its_gelu_without_a_sign(mode: HopperMode | None):
    first, second = random_w4a4(Int4(), n=192, k=128), random_w4a4(Int4(), n=128, k=192)
    one = fused_linear(first) if mode is None else hopper_linear(first, mode)
    two = behind_gelu(second, mode, 0)
    fused = fused_feed_forward(one, two)
    assert fused is not None
    x = activations(9, 128)
    assert torch.equal(fused(x), two(nn.functional.gelu(one(x), approximate="tanh")))


def test_modes_with_8_bit_activations_need_no_shift():
    solution = random_w4a4(Int4())
    x = activations(5, 192)
    for start in (0, 64):
        layer = hopper_linear(solution, HopperMode.W4A8, unsigned_from=start)
        assert torch.equal(layer(x), hopper_linear(solution, HopperMode.W4A8)(x))


def test_a_layer_in_two_parts_gives_and_takes_its_branch_whole():
    solution = random_w4a4(Int4())
    layer = fused_linear(solution, unsigned_from=64)
    assert isinstance(layer, SplitLinear)
    found = layer.branch
    assert_same_numbers(found, solution, "down", "up", "bias")
    x = activations(5, 192)
    before = layer(x)
    layer.set_branch(replace(found, up=torch.zeros_like(found.up)))
    assert not torch.equal(layer(x), before)
    layer.set_branch(found)
    assert torch.equal(layer(x), before)


def test_a_layers_columns_come_apart_without_loss():
    solution = random_w4a4(Int4())
    before, after = split_columns(solution, 64)
    assert torch.equal(torch.cat((before.codes, after.codes), 1), solution.codes)
    assert torch.equal(torch.cat((before.scales, after.scales), 1), solution.scales)
    assert torch.equal(torch.cat((before.smooth, after.smooth)), solution.smooth)
    assert (before.plan.linear.in_features, after.plan.linear.in_features) == (64, 128)
    assert after.bias is None


# ------------------------------------------------------------------------------------------ diffusers' feed-forward


def feed_forward(activation: str) -> nn.Module:
    from diffusers.models.attention import FeedForward

    return FeedForward(128, mult=2, activation_fn=activation).eval()


def with_fused_linears(module: nn.Module) -> nn.Module:
    module.net[0].proj = fused_linear(random_w4a4(Int4(), n=module.net[0].proj.out_features, k=128))  # type: ignore[union-attr]
    module.net[2] = fused_linear(random_w4a4(Int4(), n=128, k=256))  # type: ignore[index]
    return module


def test_diffusers_feed_forward_with_gelu_by_tanh_is_fused():
    model = nn.ModuleDict({"ff": with_fused_linears(feed_forward("gelu-approximate"))})
    x = activations(6, 128)
    before = model["ff"](x)
    assert fuse_feed_forwards(model) == 1
    assert isinstance(model["ff"], FusedFeedForward)
    assert torch.equal(model["ff"](x), before)


@pytest.mark.parametrize("mode", [None, HopperMode.EXACT], ids=["portable", "hopper"])
def test_a_fused_feed_forward_runs_where_accelerate_brings_every_buffer_for_one_call(mode: HopperMode | None):
    """As diffusers' sequential offload does for models with parameters of their own, such as Wan's and PixArt's."""
    one, two = (
        fused_linear(solution) if mode is None else hopper_linear(solution, mode)
        for solution in (random_w4a4(Int4(), n=192, k=128), random_w4a4(Int4(), n=128, k=192))
    )
    fused = fused_feed_forward(one, two)
    assert fused is not None
    model = nn.Sequential(fused)
    x = activations(9, 128)
    before = model(x)
    cpu_offload(model, CPU, offload_buffers=True)
    offloaded = [buffer.device.type for buffer in model.buffers()]
    assert set(offloaded) == {"meta"}
    for _ in range(2):
        assert torch.equal(model(x), before)
        assert [buffer.device.type for buffer in model.buffers()] == offloaded, "what was brought is gone"


@pytest.mark.parametrize("activation", ["gelu", "geglu", "gelu-approximate"])
def test_other_feed_forwards_are_left_alone(activation: str):
    module = feed_forward(activation)
    if activation != "gelu-approximate":  # that one keeps its 16-bit linears
        with_fused_linears(module)
    assert fuse_feed_forwards(nn.ModuleDict({"ff": module})) == 0


# ------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_keep_their_contract_with_torch(precision: Precision):
    """Schemas, shapes under torch.compile, and no aliasing, as torch's own checker sees them."""
    first, second = (
        pack_w4a4(random_w4a4(precision, n=192, k=128)),
        pack_w4a4(random_w4a4(precision, n=128, k=192)),
    )
    name = precision.name
    tests = ("test_schema", "test_faketensor")
    inputs = (activations(40, 128), first.inverse_smooth, first.down)
    torch.library.opcheck(torch.ops.svdq.quantize_down.default, inputs, {"precision": name}, test_utils=tests)
    layer = (first.weight, first.weight_scales, first.up, first.outer, first.bias)
    quantized = torch.ops.svdq.quantize_down(*inputs, precision=name)
    torch.library.opcheck(
        torch.ops.svdq.w4a4_gemm.default,
        (*quantized, *layer),
        {"m": 40, "n": 192, "precision": name},
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.svdq.w4a4_gelu_quantize.default,
        (*quantized, *layer, second.inverse_smooth, second.down),
        {"m": 40, "precision": name},
        test_utils=tests,
    )
    modulation = pack_w4a16(random_w4a16())
    torch.library.opcheck(
        torch.ops.svdq.w4a16_linear.default,
        (activations(3, 128), modulation.weight, modulation.scales, modulation.bias),
        {"n": 136},
        test_utils=tests,
    )


def test_torch_compile_keeps_the_graph_whole():
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object):
        graphs.append(graph)
        return graph

    first, second = fused_linear(random_w4a4(Int4(), n=192, k=128)), fused_linear(random_w4a16(n=136, k=192))
    model = nn.Sequential(first, nn.GELU(), second)
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for m in (40, 3, 129):
        x = activations(m, 128)
        assert torch.equal(compiled(x), model(x))
    assert graphs
    for graph in graphs:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in called if "svdq" in name] == [
            "svdq.quantize_down",
            "svdq.w4a4_gemm",
            "svdq.w4a16_linear",
        ]


@pytest.mark.parametrize("mode", [None, HopperMode.EXACT], ids=["portable", "hopper"])
def test_feed_forwards_whose_branch_is_large_run_one_layer_after_the_other(mode: HopperMode | None):
    """Partial hidden vectors of a rank of 64 are as many bytes as the activation that fusing saves."""

    def layer(rank: int, n: int, k: int) -> KernelW4A4Linear:
        solution = random_w4a4(Int4(), n=n, k=k, rank=rank)
        made = fused_linear(solution) if mode is None else hopper_linear(solution, mode)
        assert isinstance(made, KernelW4A4Linear)
        return made

    first = layer(32, 192, 128)
    assert fused_feed_forward(first, layer(64, 128, 192)) is None
    second = layer(32, 128, 192)
    fused = fused_feed_forward(first, second)
    assert fused is not None
    second.set_branch(layer(96, 128, 192).branch)  # as a LoRA that is added to a loaded model does
    x = activations(9, 128)
    ran: list[str] = []
    first.multiply_gelu_quantize = lambda *_: ran.append("fused")  # type: ignore[method-assign]
    assert torch.equal(fused(x), second(nn.functional.gelu(first(x), approximate="tanh")))
    assert not ran
