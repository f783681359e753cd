"""A 1x1 convolution is a linear layer over channels: planned, calibrated, solved and run as one (SANA)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from svdq_cli.calibration.collect import collect_stats
from svdq_cli.formats import format_named
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.plan import plan_model
from svdq_cli.planning.pointwise import is_pointwise
from svdq_cli.records import Int4, ModelPlan, SolveSettings
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.replace import PointwiseConvolution, replace_linears
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.linear import solve_input
from svdq_cli.source import open_source, read_tensor
from tests.tiny_families import tiny_pipeline

CONVOLUTIONS = ("transformer_blocks.0.ff.conv_inverted", "transformer_blocks.0.ff.conv_point")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sana", tmp_path_factory.mktemp("tiny") / "sana")


def plan_of(folder: Path) -> ModelPlan:
    """As a format plans it that can hold convolutions."""
    return plan_model(open_source(folder), precision=Int4(), rank=16, supports=lambda layer: None)


def test_they_are_planned_with_their_channels(sana: Path):
    plan = plan_of(sana)
    inverted = plan.by_name[CONVOLUTIONS[0]].linear
    assert (inverted.kind, inverted.in_features, inverted.out_features) == ("conv1x1", 128, 512)
    assert plan.by_name[CONVOLUTIONS[1]].linear.bias is False
    # 3x3, and depthwise: no linear
    assert not any(linear.name.endswith("conv_depth") for linear in plan.kept)


def test_nunchaku_lite_keeps_them_and_says_why(sana: Path):
    reason = format_named("nunchaku-lite").unsupported_reason(plan_of(sana).by_name[CONVOLUTIONS[0]])
    assert reason is not None
    assert "1x1 convolution" in reason


def test_statistics_and_solution_stand_for_the_convolution(sana: Path):
    """Channels, not pixels, are what is counted; the converted module computes what the convolution did."""
    plan = plan_of(sana)
    inputs = [shared for shared in plan.inputs if shared.name in CONVOLUTIONS]
    pipe = load_source_pipeline(sana, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name in CONVOLUTIONS:
        pipe.transformer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    settings = SamplingSettings(steps=1, guidance=1.0, height=32, width=32, seed=0, max_sequence_length=8)
    stats = collect_stats(pipe, pipe.transformer, inputs, ["a red circle"], sampling=settings, rows=64)
    source = open_source(sana)
    for shared in inputs:
        name = shared.name
        before = pipe.transformer.get_submodule(name)
        torch.testing.assert_close(stats[name].abs_max, seen[name].abs().amax(dim=(0, 2, 3)))
        assert stats[name].tokens_seen == seen[name][:, 0].numel()
        weight = read_tensor(source, f"{name}.weight").float().flatten(1)
        bias = read_tensor(source, f"{name}.bias").float() if plan.by_name[name].linear.bias else None
        solved = solve_input(
            shared,
            {name: plan.by_name[name]},
            {name: LinearWeights(weight, bias)},
            stats[name],
            SolveSettings("closed-form", 0, torch.bfloat16),
        )
        replace_linears(pipe.transformer, {name: quantized_linear(solved.w4a4[0])})
        after = pipe.transformer.get_submodule(name)
        assert isinstance(after, PointwiseConvolution)
        wanted, got = before(seen[name]), after(seen[name])
        assert got.shape == wanted.shape
        assert (
            got - wanted
        ).norm() < 0.25 * wanted.norm()  # 4 bits on random weights; a transposed one is off by 1.4


@pytest.mark.parametrize(
    ("layer", "pointwise"),
    [
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(4, 8, 3, padding=1), False),
        (nn.Conv2d(4, 4, 1, groups=4), False),
        (nn.Conv2d(4, 8, 1, stride=2), False),
        (nn.Linear(4, 8), False),
    ],
    ids=["1x1", "3x3", "depthwise", "strided", "linear"],
)
def test_only_convolutions_that_mix_channels_and_nothing_else_count(layer: nn.Module, pointwise: bool):
    assert is_pointwise(layer) is pointwise
