"""Random packed layers and inputs for kernel tests, and what counts as agreement with a reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import HopperOperands, pack_hopper
from svdq_cli.gpu.launcher import Launcher
from svdq_cli.gpu.variants import BLOCK_N
from svdq_cli.pack.kernel_tiles import (
    pack_column_micro_scales,
    pack_column_scales,
    pack_down_fragments,
    pack_up_fragments,
    pack_w4a16_weight,
    pack_weight_codes,
)
from svdq_cli.pack.padding import pad_rows
from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution
from svdq_cli.runtime import ops  # defines torch.ops.svdq
from svdq_cli.runtime.ops.records import InputOperands, Product

padded = partial(pad_rows, multiple=BLOCK_N)


@dataclass(frozen=True, slots=True)
class Shape:
    """x (M, K) times a weight (N, K) with a branch of rank R."""

    m: int
    k: int
    n: int
    rank: int

    @property
    def label(self) -> str:
        return f"m{self.m}-k{self.k}-n{self.n}-r{self.rank}"


# One row, tiles that are not full, one row more than a tile, several blocks, a picture; ranks from none to 128.
SHAPES = (
    *(
        Shape(m, (64, 128, 192, 320)[(i + j) % 4], (128, 136, 256)[(i + 2 * j) % 3 if m < 100 else 0], rank)
        for i, m in enumerate((1, 7, 32, 33, 127, 129))
        for j, rank in enumerate(range(0, 129, 16))
    ),
    Shape(4608, 64, 128, 32),
)


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """One W4A4 layer as `w4a4_gemm` reads it, and what `quantize_down` needs."""

    inverse_smooth: Tensor
    down: Tensor
    weight: Tensor
    weight_scales: Tensor
    up: Tensor
    outer: Tensor | None
    bias: Tensor | None

    @property
    def gemm(self) -> Product:
        return Product(self.weight, self.weight_scales, self.up, self.outer, self.bias)

    @property
    def input(self) -> InputOperands:
        return InputOperands(self.inverse_smooth, self.down)


def random_operands(shape: Shape, precision: Precision, dtype: torch.dtype, *, seed: int) -> Operands:
    """Scales and factors of order one, so that product, branch and bias all show in the result."""
    draw = torch.Generator().manual_seed(seed)
    k, n, rank = shape.k, shape.n, shape.rank
    up = torch.randn(n, rank, generator=draw).to(dtype)
    outer = None
    match precision:
        case Int4():
            codes = torch.randint(-8, 8, (n, k), generator=draw, dtype=torch.int8)
            scales = pack_column_scales(padded(torch.rand(n, k // 64, generator=draw).to(dtype) / 16))
        case NvFp4():
            codes = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.int8)
            micro = (torch.rand(n, k // 16, generator=draw) * 448).to(torch.float8_e4m3fn).view(torch.uint8)
            scales = pack_column_micro_scales(padded(micro).view(torch.float8_e4m3fn))
            outer = padded(torch.rand(n, generator=draw) / 1000)
    return Operands(
        inverse_smooth=1 / (torch.rand(k, generator=draw) + 0.5).to(dtype).float(),
        down=pack_down_fragments((torch.randn(rank, k, generator=draw) / k**0.5).to(dtype)),
        weight=pack_weight_codes(padded(codes)),
        weight_scales=scales,
        up=pack_up_fragments(padded(up)),
        outer=outer,
        bias=padded(torch.randn(n, generator=draw).to(dtype)) if seed % 3 else None,
    )


def random_rows(shape: Shape, dtype: torch.dtype, *, seed: int) -> Tensor:
    """(M, K), a few channels much larger than the others and some groups zero."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.m, shape.k, generator=draw)
    x[:, :: shape.k // 2] *= 30
    x[shape.m // 2, :64] = 0
    return x.to(dtype)


def random_w4a16(shape: Shape, dtype: torch.dtype, *, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed weight, scales and bias."""
    draw = torch.Generator().manual_seed(seed)
    n, k = shape.n, shape.k
    codes = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8)
    pairs = torch.stack((torch.rand(n, k // 64, generator=draw), torch.randn(n, k // 64, generator=draw)), -1)
    scales = padded((pairs / 8).to(dtype)).transpose(0, 1).contiguous()
    bias = padded(torch.randn(n, generator=draw).to(dtype)) if seed % 3 else None
    return pack_w4a16_weight(padded(codes)), scales, bias


def random_shapes(count: int) -> Iterator[Shape]:
    """Any sizes a kernel may be called with: small M as often as large, N down to one row of its tiles."""
    draw = random.Random(count)
    for _ in range(count):
        m = round(2 ** draw.uniform(0, 9))
        yield Shape(m, 64 * draw.randint(1, 8), 8 * draw.randint(1, 40), 16 * draw.randint(0, 8))


def assert_w4a4_layer_matches_its_reference(
    launcher: Launcher,
    shape: Shape,
    precision: Precision,
    dtype: torch.dtype,
    *,
    seed: int,
    device: torch.device,
    slack: float = 1e-5,
) -> None:
    """Both kernels of a random layer: codes and scales to the bit, an int4 product without a branch too."""
    layer = on_device(random_operands(shape, precision, dtype, seed=seed), device)
    x = random_rows(shape, dtype, seed=seed).to(device)
    wanted = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, precision=precision)
    found = ops.quantize_down.launch(launcher, x, layer.inverse_smooth, layer.down, precision=precision)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    if shape.rank:
        assert_agrees(found[2], wanted[2], slack=slack)
    how = {"m": shape.m, "n": shape.n, "precision": precision}
    y = ops.w4a4_gemm.launch(launcher, wanted, layer.gemm, **how)
    reference = ops.w4a4_gemm.reference(wanted, layer.gemm, **how)
    assert_agrees(y, reference, exact=shape.rank == 0 and isinstance(precision, Int4), slack=slack)


def on_device(operands, device: torch.device):
    """A record of tensors, moved."""
    tensors = {name: value for name in operands.__slots__ if (value := getattr(operands, name)) is not None}
    return replace(operands, **{name: tensor.to(device) for name, tensor in tensors.items()})


def assert_agrees(
    found: Tensor, reference: Tensor, *, exact: bool = False, differing: float = 0.01, slack: float = 1e-5
) -> None:
    """The same 16-bit numbers; unless `exact`, a few may lie one rounding apart: a tensor core has its own order of
    adding, so a float32 sum can fall on the other side of a rounding boundary. `slack`, of the largest number, is for
    sums that cancel."""
    if exact:
        assert torch.equal(found, reference)
        return
    ulp = torch.finfo(reference.dtype).eps
    largest = float(reference.float().abs().max())
    torch.testing.assert_close(found, reference, rtol=ulp, atol=slack * max(largest, 1e-30))
    assert (found != reference).float().mean() <= differing


def random_hopper_operands(
    shape: Shape, mode: HopperMode, dtype: torch.dtype, *, seed: int
) -> HopperOperands:
    """As `random_operands`, for Hopper's own kernels. The rank must be a multiple of 32."""
    draw = torch.Generator().manual_seed(seed)
    k, n, rank = shape.k, shape.n, shape.rank
    codes = torch.randint(-8, 8, (n, k), generator=draw, dtype=torch.int8)
    solution = W4A4Solution(
        plan=W4A4Plan(Linear("layer", k, n, bias=True), Int4(), rank),
        smooth=(torch.rand(k, generator=draw) + 0.5).to(dtype),
        down=(torch.randn(rank, k, generator=draw) / k**0.5).to(dtype),
        up=torch.randn(n, rank, generator=draw).to(dtype),
        codes=codes,
        scales=torch.rand(n, k // 64, generator=draw).to(dtype) / 16,
        outer=None,
        bias=torch.randn(n, generator=draw).to(dtype) if seed % 3 else None,
    )
    return pack_hopper(solution, mode)
