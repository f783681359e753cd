"""Random solved layers: numbers without a meaning, but of every shape and dtype that a format must carry."""

from __future__ import annotations

import torch

from svdq_cli.formats.soundness import scale_dtype
from svdq_cli.records import (
    LayerPlan,
    LayerSolution,
    Linear,
    ModelPlan,
    NvFp4,
    Precision,
    RotatedPlan,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.solve.smoothing import invertible


def w4a4_plan(
    name: str = "blocks.0.to_q",
    *,
    precision: Precision,
    rows: int = 128,
    columns: int = 128,
    rank: int = 16,
    bias: bool = True,
) -> W4A4Plan:
    return W4A4Plan(Linear(name, columns, rows, bias), precision, rank)


def w4a16_plan(
    name: str = "blocks.0.norm.linear", *, rows: int = 24, columns: int = 128, bias: bool = True
) -> W4A16Plan:
    return W4A16Plan(Linear(name, columns, rows, bias))


def model_plan(*layers: LayerPlan) -> ModelPlan:
    return ModelPlan("flux", "FluxTransformer2DModel", ("transformer",), 0, layers, kept=(), inputs=())


def random_solution(
    plan: LayerPlan, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, outer_per_row: bool = False
) -> LayerSolution:
    """Weights of about unit gain, so that outputs of a tiny model stay in range."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = plan.linear.out_features, plan.linear.in_features

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    def positive(*shape: int, around: float) -> torch.Tensor:
        return around * (0.5 + torch.rand(shape, generator=generator))

    def codes(low: int, high: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, (rows, columns), generator=generator, dtype=kind)

    bias = normal(rows, std=0.1) if plan.linear.bias else None
    if isinstance(plan, W4A16Plan):
        scales = positive(rows, columns // plan.group, around=columns**-0.5 / 4).to(dtype)
        return W4A16Solution(plan, codes(0, 16, torch.uint8), scales, -(scales * 7), bias)

    if isinstance(plan, RotatedPlan):
        if plan.activation_bits == 4:
            scales = positive(rows, 1, around=columns**-0.5 / 4)
            return RotatedSolution(plan, codes(-7, 8, torch.int8), scales, None, bias)
        scales = positive(rows, columns // plan.group, around=120.0).to(torch.float8_e4m3fn)
        by_row = positive(rows, around=columns**-0.5 / 40)
        return RotatedSolution(plan, codes(0, 16, torch.int8), scales, by_row, bias)

    floating = isinstance(plan.precision, NvFp4)
    groups = columns // plan.precision.group
    scales = positive(rows, groups, around=64.0 if floating else columns**-0.5 / 4)
    outer = positive(rows if outer_per_row else 1, around=columns**-0.5 / 128).to(dtype) if floating else None
    smooth = positive(columns, around=1.0)
    return W4A4Solution(
        plan=plan,
        smooth=invertible(smooth, dtype) if plan.branchless else smooth.to(dtype),
        down=normal(plan.rank, columns, std=columns**-0.5),
        up=normal(rows, plan.rank, std=max(1, plan.rank) ** -0.5),
        codes=codes(0, 16, torch.int8) if floating else codes(-8, 8, torch.int8),
        scales=scales.to(scale_dtype(plan, dtype)),
        outer=outer,
        bias=bias,
    )


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal shape, dtype and bytes: NaN and the sign of zero count."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b)))


def differing_fields(a: LayerSolution, b: LayerSolution) -> list[str]:
    """The fields of two solutions that are not the same bits."""
    names = [name for name in type(a).__dataclass_fields__ if name != "plan"]
    return [name for name in names if not same_bits(getattr(a, name), getattr(b, name))]
