"""Converted linears take the place of a model's own, or nothing changes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from svdq_cli.errors import InputError
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.reconstruct.tunable import Tunable
from svdq_cli.records import Int4, Linear, W4A4Plan
from svdq_cli.runtime.adapted import AdaptedLinear
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear, CpuW4A16Linear
from svdq_cli.runtime.fused import FusedW4A4Linear, FusedW4A16Linear, SplitLinear
from svdq_cli.runtime.linear import W4A4Linear, W4A16Linear
from svdq_cli.runtime.naive import naive_solution
from svdq_cli.runtime.replace import PointwiseConvolution, replace_linears


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.net = nn.ModuleList([nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)])

    def forward(self, x):
        for step in self.net:
            x = step(x)
        return x


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def linear_of(m: nn.Module, name: str) -> nn.Linear:
    linear = m.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def converted(linear: nn.Linear) -> W4A4Linear:
    plan = W4A4Plan(Linear("", linear.in_features, linear.out_features, bias=True), Int4(), rank=0)
    return W4A4Linear(naive_solution(plan, linear.weight.detach(), linear.bias.detach(), torch.bfloat16))


def test_linears_in_lists_and_sequences_are_replaced_and_run():
    m = model()
    x = torch.randn(4, 128)
    before = m(x)
    layers = {name: converted(part) for name, part in m.named_modules() if isinstance(part, nn.Linear)}
    assert set(layers) == {"0.net.0", "0.net.2", "1.net.0", "1.net.2"}
    replace_linears(m, layers)
    assert not any(isinstance(part, nn.Linear) for part in m.modules())
    assert m.get_submodule("1.net.2") is layers["1.net.2"]
    after = m(x)
    assert not torch.equal(before, after)
    assert (before - after).norm() < 0.5 * before.norm()  # two naive 4-bit blocks, still the same function


def test_an_unknown_name_is_refused_with_the_nearest_one():
    m = model()
    with pytest.raises(InputError, match=r"no layer '0\.net\.3'") as refusal:
        replace_linears(m, {"0.net.3": converted(linear_of(m, "0.net.0"))})
    assert refusal.value.where == "0.net.3"
    assert "0.net" in (refusal.value.hint or "")


def test_another_shape_is_refused_and_named():
    m = model()
    with pytest.raises(InputError, match=r"0\.net\.2 maps 256 to 128 .* maps 128 to 256"):
        replace_linears(m, {"0.net.2": converted(linear_of(m, "0.net.0"))})


def test_a_layer_that_is_not_linear_is_refused():
    m = model()
    with pytest.raises(InputError, match=r"0\.norm is a LayerNorm"):
        replace_linears(m, {"0.norm": converted(linear_of(m, "0.net.0"))})


def test_one_bad_name_leaves_the_whole_model_as_it_was():
    m = model()
    good = linear_of(m, "0.net.0")
    with pytest.raises(InputError):
        replace_linears(m, {"0.net.0": converted(good), "nowhere": converted(good)})
    assert m.get_submodule("0.net.0") is good


@pytest.mark.parametrize(
    ("module", "replaced"),
    [
        (W4A4Linear, nn.Linear),
        (W4A16Linear, nn.Linear),
        (FusedW4A4Linear, nn.Linear),
        (FusedW4A16Linear, nn.Linear),
        (SplitLinear, nn.Linear),
        (CpuW4A4Linear, nn.Linear),
        (CpuW4A16Linear, nn.Linear),
        (HopperW4A4Linear, nn.Linear),
        (AdaptedLinear, nn.Linear),
        (Tunable, nn.Linear),
        (PointwiseConvolution, nn.Conv2d),
    ],
)
def test_a_layer_is_called_by_keyword_as_the_one_it_replaces(
    module: type[nn.Module], replaced: type[nn.Module]
):
    """AnimateDiff's motion modules do so."""
    assert [*inspect.signature(module.forward).parameters] == [
        *inspect.signature(replaced.forward).parameters
    ]
