"""Int4 linears in Hopper's modes: exact packing, what each mode may differ by, which one is the default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svdq_cli.experimental.hopper.choice import (
    FILE_NAME,
    PORTABLE,
    ModeMeasurement,
    choose_hopper_mode,
    measured_modes,
)
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.experimental.hopper.modes import HopperMode, hopper_mode
from svdq_cli.experimental.hopper.operands import pack_hopper, unpack_hopper, unsupported_reason
from svdq_cli.records import Int4, NvFp4, W4A4Solution
from svdq_cli.runtime.fused import fused_linear
from svdq_cli.runtime.kernel_linear import FusedFeedForward, fused_feed_forward
from svdq_cli.runtime.linear import w4a4_exact
from tests.runtime.test_fused import activations, assert_same_numbers, random_w4a4

KEEPING = [HopperMode.EXACT, HopperMode.W4A8]  # the checkpoint's 4-bit weights
MODES = [pytest.param(mode, id=mode.label) for mode in HopperMode]


def error_of(layer: nn.Module, x: Tensor, wanted: Tensor) -> float:
    return float((layer(x).float() - wanted).norm() / wanted.norm())


def sixteen_bit_weight(solution: W4A4Solution) -> Tensor:
    """What the layer's 4-bit weight stands for, smoothing undone."""
    groups = solution.codes.float().unflatten(-1, (-1, 64)) * solution.scales.float().unsqueeze(-1)
    return groups.flatten(-2) / solution.smooth.float() + solution.up.float() @ solution.down.float()


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("mode", KEEPING)
@pytest.mark.parametrize("rank", [0, 16, 32, 48])
def test_unpacking_a_layer_gives_back_its_numbers(mode: HopperMode, rank: int):
    solution = random_w4a4(Int4(), rank=rank)
    found = unpack_hopper(pack_hopper(solution, mode), solution.plan)
    assert_same_numbers(found, solution, "smooth", "down", "up", "codes", "scales", "outer", "bias")


def test_fp8_weights_are_not_given_back_as_codes():
    solution = random_w4a4(Int4())
    with pytest.raises(ValueError, match="layer: mode fp8 rounded the weight"):
        unpack_hopper(pack_hopper(solution, HopperMode.FP8), solution.plan)


def test_what_hoppers_kernels_cannot_run_is_named():
    good = random_w4a4(Int4(), n=128, k=128)
    assert unsupported_reason(good) is None
    assert unsupported_reason(random_w4a4(NvFp4())) == "only int4 W4A4 layers have Hopper kernels"
    assert unsupported_reason(random_w4a4(Int4(), n=132)) == "out_features 132 is not a multiple of 8"


@pytest.mark.parametrize("mode", MODES)
def test_4_bit_modes_keep_a_weight_in_4_bits(mode: HopperMode):
    operands = pack_hopper(random_w4a4(Int4(), n=128, k=192, rank=0), mode)
    bits = 8 * operands.weight.nbytes / (128 * 192)
    assert bits == (8 if mode == HopperMode.FP8 else 4)


# ------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("rank", [0, 20, 32])
def test_the_exact_mode_is_the_portable_kernels_arithmetic(rank: int):
    solution = random_w4a4(Int4(), rank=rank)
    x = activations(2, 5, 192)
    layer = HopperW4A4Linear(solution, HopperMode.EXACT)
    assert torch.equal(layer(x), fused_linear(solution)(x))
    assert error_of(layer, x, w4a4_exact(x, solution)) <= 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_fewer_rounded_numbers_mean_a_smaller_error(mode: HopperMode):
    """Against the 16-bit activation times the layer's own weight: 4-bit activations cost most, e4m3 ones little, and
    e4m3 weights a little more."""
    solution = random_w4a4(Int4(), n=256, k=512)
    x = activations(64, 512)
    assert solution.bias is not None
    truth = x.float() @ sixteen_bit_weight(solution).T + solution.bias.float()
    error = error_of(HopperW4A4Linear(solution, mode), x, truth)
    low, high = {
        HopperMode.EXACT: (0.06, 0.12),
        HopperMode.W4A8: (0.014, 0.022),
        HopperMode.FP8: (0.022, 0.035),
    }[mode]
    assert low < error < high


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_keeps_its_buffers_when_it_is_cast(mode: HopperMode):
    layer = HopperW4A4Linear(random_w4a4(Int4()), mode)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for name, tensor in layer.half().named_buffers():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))


def test_two_exact_layers_with_gelu_between_are_one_module():
    first, second = random_w4a4(Int4(), n=192, k=128), random_w4a4(Int4(), n=128, k=192)
    one, two = (HopperW4A4Linear(solution, HopperMode.EXACT) for solution in (first, second))
    fused = fused_feed_forward(one, two)
    assert isinstance(fused, FusedFeedForward)
    x = activations(9, 128)
    assert torch.equal(fused(x), two(nn.functional.gelu(one(x), approximate="tanh")))
    other = HopperW4A4Linear(second, HopperMode.W4A8)
    assert fused_feed_forward(one, other) is None
    assert fused_feed_forward(two, two) is None


@pytest.mark.parametrize("mode", MODES)
def test_operators_keep_their_contract_with_torch(mode: HopperMode):
    first, second = (
        pack_hopper(random_w4a4(Int4(), n=192, k=128), mode),
        pack_hopper(random_w4a4(Int4(), n=128, k=192), mode),
    )
    tests = ("test_schema", "test_faketensor")
    inputs, how = (activations(40, 128), first.inverse_smooth, first.down), {"mode": mode.label}
    torch.library.opcheck(torch.ops.svdq.hopper_quantize_down.default, inputs, how, test_utils=tests)
    quantized = torch.ops.svdq.hopper_quantize_down(*inputs, **how)
    layer = (*quantized, *first.product)
    sizes = {"m": 40, "n": 192, **how}
    torch.library.opcheck(torch.ops.svdq.hopper_gemm.default, layer, sizes, test_utils=tests)
    if mode == HopperMode.EXACT:
        after = (*layer, second.inverse_smooth, second.down)
        torch.library.opcheck(torch.ops.svdq.hopper_gelu_quantize.default, after, {"m": 40}, test_utils=tests)


def test_torch_compile_keeps_the_graph_whole():
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object):
        graphs.append(graph)
        return graph

    layer = HopperW4A4Linear(random_w4a4(Int4()), HopperMode.W4A8)
    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    for m in (40, 3):
        x = activations(m, 192)
        assert torch.equal(compiled(x), layer(x))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [name for name in called if "svdq" in name] == ["svdq.hopper_quantize_down", "svdq.hopper_gemm"]


# ------------------------------------------------------------------------------------------ the default


def test_without_a_measurement_the_portable_exact_kernels_are_the_default():
    found = choose_hopper_mode(())
    assert found.mode is None
    assert found.reason == "int4 exact on the portable kernels: the Hopper kernels have not been measured yet"


def test_the_fastest_mode_near_enough_to_exact_is_the_default():
    measured = [
        ModeMeasurement(PORTABLE, 90_000.0, 100.0),
        ModeMeasurement("exact", 60_000.0, 100.0),
        ModeMeasurement("w4a8", 52_000.0, 36.0),
        ModeMeasurement("fp8", 50_000.0, 34.0),
    ]
    assert choose_hopper_mode(measured).mode == HopperMode.W4A8
    assert choose_hopper_mode(measured).reason == (
        "int4 in mode w4a8: the fastest measured (52.0 ms a step, 36 dB to exact)"
    )
    assert choose_hopper_mode(measured[:1] + measured[3:]).mode is None


def test_a_measurement_is_read_from_its_file(tmp_path: Path):
    path = tmp_path / FILE_NAME
    assert measured_modes(path) == ()
    path.write_text(json.dumps({"modes": [{"mode": "exact", "step_us": 1.5, "psnr_db": 100.0}]}))
    assert measured_modes(path) == (ModeMeasurement("exact", 1.5, 100.0),)


def test_modes_have_labels_and_say_what_they_are():
    for mode in HopperMode:
        assert hopper_mode(mode.label) is mode
    assert len({mode.exactness for mode in HopperMode}) == len(HopperMode)
