"""Layers that read one activation quantize it once, and get what they would have made of it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.records import Int4, W4A4Solution
from svdq_cli.runtime.fused import FusedW4A4Linear
from svdq_cli.runtime.kernel_linear import KernelW4A4Linear
from svdq_cli.runtime.replace import share_quantizers
from tests.runtime.test_fused import activations, random_w4a4

KERNELS = [
    pytest.param(None, id="portable"),
    *(pytest.param(mode, id=f"hopper-{mode.label}") for mode in HopperMode),
]


class Attention(nn.Module):
    """Three layers with one input, as a conversion makes them: other codes, one branch's down projection."""

    def __init__(self, mode: HopperMode | None = None, *, rank: int = 32) -> None:
        super().__init__()
        first = random_w4a4(Int4(), rank=rank)
        self.to_q = on_kernels(first, mode)
        self.to_k = on_kernels(replace(first, codes=first.codes.flip(0)), mode)
        self.to_v = on_kernels(replace(first, codes=first.codes.flip(1)), mode)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(x), self.to_v(x)


def on_kernels(solution: W4A4Solution, mode: HopperMode | None) -> KernelW4A4Linear:
    return FusedW4A4Linear(solution) if mode is None else HopperW4A4Linear(solution, mode)


class Quantizations(TorchDispatchMode):
    """Counts the first kernel's launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "quantize_down" in str(func)
        return func(*args, **(kwargs or {}))


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def pair() -> tuple[Attention, Attention]:
    """One whose layers share a quantizer, and one whose layers don't."""
    shared = Attention()
    assert share_quantizers(shared) == 1
    return shared, Attention()


@pytest.mark.parametrize("mode", KERNELS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_one_activation_is_quantized_once(mode: HopperMode | None, context):
    model, x = Attention(mode), activations(2, 5, 192)
    with context():
        wanted = model(x)
        assert share_quantizers(model) == 1
        with Quantizations() as quantizations:
            assert_same(model(x), wanted)
    assert quantizations.count == 1


def test_nothing_is_kept_when_all_layers_have_had_it(pair: tuple[Attention, Attention]):
    shared, _ = pair
    x = activations(4, 192)
    shared.to_q(x)
    assert shared.to_q.quantizer._kept is not None
    shared.to_k(x)
    shared.to_v(x)
    assert shared.to_q.quantizer._kept is None


def test_every_activation_is_quantized_for_itself(pair: tuple[Attention, Attention]):
    shared, alone = pair
    one, other = activations(4, 192), 2 * activations(4, 192)
    assert torch.equal(shared.to_q(one), alone.to_q(one))
    assert torch.equal(shared.to_k(other), alone.to_k(other))
    assert torch.equal(shared.to_v(one.clone()), alone.to_v(one))


def test_a_write_into_the_activation_is_seen(pair: tuple[Attention, Attention]):
    shared, alone = pair
    x = activations(4, 192)
    shared.to_q(x)
    x.mul_(-2)
    assert torch.equal(shared.to_k(x), alone.to_k(x))


def test_a_layer_that_comes_again_quantizes_again(pair: tuple[Attention, Attention]):
    """Where nobody counts writes, the same tensor may hold the next step's activation."""
    shared, alone = pair
    with torch.inference_mode():
        x = activations(4, 192)
        shared.to_q(x)
        x.mul_(-2)
        assert torch.equal(shared.to_q(x), alone.to_q(x))


def test_torch_compile_keeps_one_quantization_in_a_whole_graph(pair: tuple[Attention, Attention]):
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object):
        graphs.append(graph)
        return graph

    shared, alone = pair
    compiled = torch.compile(shared, backend=keep, fullgraph=True)
    with torch.no_grad():
        for m in (40, 3, 40):
            x = activations(m, 192)
            assert_same(compiled(x), alone(x))
    for graph in graphs:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in called if "svdq" in name] == ["svdq.quantize_down", *["svdq.w4a4_gemm"] * 3]


def test_layers_with_another_down_projection_or_none_quantize_alone():
    model = Attention()
    branch = model.to_k.branch
    model.to_k.set_branch(replace(branch, down=branch.down.flip(0)))
    assert share_quantizers(model) == 1
    assert model.to_q.quantizer is model.to_v.quantizer
    assert model.to_k.quantizer is not model.to_q.quantizer
    assert share_quantizers(Attention(rank=0)) == 0


@pytest.mark.parametrize("mode", KERNELS)
def test_a_layer_with_a_branch_of_its_own_leaves_the_others_and_comes_back(mode: HopperMode | None):
    model, x = Attention(mode), activations(4, 192)
    wanted = model(x)
    share_quantizers(model)
    branch = model.to_q.branch
    model.to_q.set_branch(replace(branch, down=-branch.down))
    found = model(x)
    assert not torch.equal(found[0], wanted[0])
    assert_same(found[1:], wanted[1:])
    assert model.to_k.quantizer._kept is None
    model.to_q.set_branch(branch)
    share_quantizers(model)
    with Quantizations() as quantizations:
        assert_same(model(x), wanted)
    assert quantizations.count == 1


def test_a_shared_quantizer_moves_and_counts_once(pair: tuple[Attention, Attention]):
    shared, alone = pair

    def bytes_of(model: nn.Module) -> int:
        return sum(tensor.nbytes for tensor in model.buffers())

    quantizer = shared.to_q.quantizer
    assert bytes_of(alone) - bytes_of(shared) == 2 * (quantizer.down.nbytes + quantizer.smoothing.nbytes)
    moved = shared.half().to("meta")
    assert {(tensor.device.type, tensor.dtype) for tensor in moved.to_v.quantizer.buffers()} == {
        ("meta", torch.float32),
        ("meta", torch.bfloat16),
    }
