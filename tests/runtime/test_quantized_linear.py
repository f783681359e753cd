"""The reference runtime against the golden vectors, against integer arithmetic, and as a module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution, W4A16Plan, W4A16Solution
from svdq_cli.runtime.linear import (
    W4A4Linear,
    W4A16Linear,
    quantized_linear,
    w4a4_exact,
    w4a4_forward,
    w4a4_weight,
    w4a16_exact,
    w4a16_forward,
)
from svdq_cli.runtime.naive import naive_solution
from svdq_cli.solve.quantizers import decode_e2m1, quantize_activation

GOLDEN = Path(__file__).parent.parent / "golden"
W4A4_GOLDEN = {
    "e2e_int4_plain_128x128_r16": Int4(),
    "e2e_nvfp4_tensor_128x128_r16": NvFp4(),
    "e2e_nvfp4_channel_384x128_r16": NvFp4(),
}
PRECISIONS = [pytest.param(Int4(), id="int4"), pytest.param(NvFp4(), id="nvfp4")]

# Sums of at most 1024 float32 products; outputs are of order 10, so 2e-5 is about twenty of their last bits.
FLOAT32_SUM = 2e-5


def golden_w4a4(name: str) -> tuple[W4A4Solution, dict[str, Tensor]]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    codes, outer = tensors["ref.codes"], tensors.get("ref.outer_scale")
    linear = Linear(name, in_features=codes.shape[1], out_features=codes.shape[0], bias=True)
    solution = W4A4Solution(
        plan=W4A4Plan(linear, W4A4_GOLDEN[name], rank=16),
        smooth=tensors["in.smooth"],
        down=tensors["stored.lora_down"],
        up=tensors["in.lora_b"],
        codes=codes,
        scales=tensors["ref.scales"],
        outer=None if outer is None else outer.reshape(-1),
        bias=tensors["stored.bias"],
    )
    return solution, tensors


def random_w4a4(
    precision: Precision, *, n: int, k: int, rank: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> W4A4Solution:
    draw = torch.Generator().manual_seed(seed)
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


def activations(m: int, k: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_w4a16(*, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> W4A16Solution:
    draw = torch.Generator().manual_seed(2)
    scales = (torch.rand(n, k // 64, generator=draw) * 0.01 + 0.01).to(dtype)
    codes = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8)
    bias = torch.randn(n, generator=draw).to(dtype)
    return W4A16Solution(W4A16Plan(Linear("mod", k, n, bias=True)), codes, scales, -7 * scales, bias)


# ------------------------------------------------------------------------------------------ golden vectors


@pytest.mark.parametrize("name", W4A4_GOLDEN)
def test_activations_are_quantized_to_the_golden_codes_and_scales(name):
    solution, golden = golden_w4a4(name)
    codes, scales = quantize_activation(golden["x"] / solution.smooth, solution.plan.precision)
    wanted = golden["run.act_codes"]
    wanted = wanted.float() if isinstance(solution.plan.precision, Int4) else decode_e2m1(wanted)
    assert torch.equal(codes, wanted)
    assert torch.equal(scales, golden["run.act_scales"].float())


@pytest.mark.parametrize("name", W4A4_GOLDEN)
def test_the_exact_value_is_the_golden_contract_value(name):
    solution, golden = golden_w4a4(name)
    y = w4a4_exact(golden["x"], solution)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, golden["y_f32"], rtol=0, atol=FLOAT32_SUM)


@pytest.mark.parametrize("name", W4A4_GOLDEN)
def test_the_forward_value_is_within_the_kernels_own_roundings(name):
    solution, golden = golden_w4a4(name)
    y, kernel = w4a4_forward(golden["x"], solution).float(), golden["y_kernel_bf16"].float()
    # The kernel rounds to bf16 (half an ulp is 2^-9 relative) after the 4-bit product, bias and branch, and in
    # int4 after each of the two groups: at most five roundings of values no larger than the sum of the parts'
    # magnitudes.
    branch = (golden["run.lora_act"] @ solution.up.float().T).abs()
    bias = golden["stored.bias"].float().abs()
    product = golden["y_f32"].abs() + branch + bias
    assert torch.all((y - kernel).abs() <= 5 * 2**-9 * (product + branch + bias))
    assert (y - kernel).norm() <= 2**-8 * kernel.norm()


@pytest.mark.parametrize("name", W4A4_GOLDEN)
def test_the_exact_value_is_as_near_the_16_bit_layer_as_four_bits_can_be(name):
    solution, golden = golden_w4a4(name)
    wanted = golden["y_unquantised_f32"]
    error = (w4a4_exact(golden["x"], solution) - wanted).norm() / wanted.norm()
    assert 0.015 < error < 0.10  # the range that the golden files state


@pytest.mark.parametrize("name", ["awq_32x128_split1", "awq_24x1024_split3", "awq_48x1024_split6"])
def test_w4a16_gives_the_golden_value(name):
    golden, parts = load_file(GOLDEN / f"{name}.safetensors"), int(name[-1])
    n, k = golden["in.codes"].shape
    # Row c * S + j of the golden result is original row j * C + c, and the scale parts' bias is one larger.
    order = torch.arange(n).reshape(parts, n // parts).T.reshape(-1)
    bias = golden["in.bias"][order].reshape(-1, parts)
    bias[:, sorted({1, parts - 2}) if parts > 1 else []] += 1
    scales = golden["in.scales"][order]
    solution = W4A16Solution(
        plan=W4A16Plan(Linear(name, k, n, bias=True)),
        codes=(golden["in.codes"][order] + 7).to(torch.uint8),
        scales=scales,
        zeros=-7 * scales,
        bias=bias.reshape(-1),
    )
    y = w4a16_exact(golden["x"], solution)
    torch.testing.assert_close(y, golden["y_f32"], rtol=0, atol=FLOAT32_SUM)


# ------------------------------------------------------------------------------------------ integer truth


def integer_product(x: Tensor, solution: W4A4Solution) -> Tensor:
    """The 4-bit product as the hardware makes it: whole-number sums per group, then scaled in float64."""
    precision = solution.plan.precision
    group, nvfp4 = precision.group, isinstance(precision, NvFp4)
    codes, scales = quantize_activation(x / solution.smooth, precision)
    # e2m1 values are halves: doubled, they are whole numbers too.
    a = (codes * (2 if nvfp4 else 1)).long().unflatten(-1, (-1, group))
    w = (decode_e2m1(solution.codes) * 2 if nvfp4 else solution.codes).long().unflatten(-1, (-1, group))
    sums = torch.einsum("mgk,ngk->mng", a, w).double() / (4 if nvfp4 else 1)
    y = torch.einsum("mng,mg,ng->mn", sums, scales.double(), solution.scales.double())
    return y if solution.outer is None else y * solution.outer.double()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 128, 128), (17, 256, 1024), (129, 128, 384)])
def test_one_float32_gemm_is_the_integer_group_sum(precision, m, n, k):
    solution = replace(random_w4a4(precision, n=n, k=k, rank=0), bias=None)
    x = activations(m, k)
    wanted = integer_product(x, solution)
    got = w4a4_exact(x, solution).double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=FLOAT32_SUM)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bfloat16_operands_and_their_products_are_exact_in_float32(precision):
    solution = random_w4a4(precision, n=16, k=1024, rank=0)
    codes, scales = quantize_activation(activations(16, 1024) / solution.smooth, precision)
    group = precision.group
    activation = (codes.unflatten(-1, (-1, group)) * scales.unsqueeze(-1)).flatten(-2)
    exact = (codes.double().unflatten(-1, (-1, group)) * scales.double().unsqueeze(-1)).flatten(-2)
    assert torch.equal(activation.double(), exact)
    weight = w4a4_weight(solution)
    assert torch.equal((activation * weight).double(), activation.double() * weight.double())


# ------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_returns_its_input_dtype_and_leading_shape_rounded_to_16_bit(precision, dtype):
    layer = W4A4Linear(random_w4a4(precision, n=128, k=256, rank=16, dtype=dtype))
    x = activations(10, 256, dtype=dtype).reshape(2, 5, 256)
    y16, y32 = layer(x), layer(x.float())
    assert (y16.dtype, y32.dtype, y16.shape) == (dtype, torch.float32, (2, 5, 128))
    assert torch.equal(y16.float(), y32)
    # One rounding of the hidden vector and one of the result, half an ulp each (bf16 2^-9, fp16 2^-12).
    half_ulp = 2**-9 if dtype == torch.bfloat16 else 2**-12
    exact = w4a4_exact(x, layer.solution)
    assert (y32 - exact).norm() <= 2 * half_ulp * exact.norm()


def test_the_outer_scale_touches_neither_bias_nor_branch():
    solution = random_w4a4(NvFp4(), n=128, k=128, rank=16)
    x = activations(7, 128)
    assert solution.outer is not None
    assert solution.bias is not None
    doubled = w4a4_exact(x, replace(solution, outer=2 * solution.outer))
    product = w4a4_exact(x, replace(solution, bias=None, down=solution.down[:0], up=solution.up[:, :0]))
    torch.testing.assert_close(doubled - w4a4_exact(x, solution), product, rtol=0, atol=FLOAT32_SUM)


def test_an_outer_scale_per_row_and_one_for_all_rows_agree():
    solution = random_w4a4(NvFp4(), n=128, k=128, rank=16)
    assert solution.outer is not None
    per_row = replace(solution, outer=solution.outer.expand(128).clone())
    x = activations(5, 128)
    assert torch.equal(w4a4_forward(x, solution), w4a4_forward(x, per_row))


def test_the_branch_reads_the_raw_activation():
    solution = random_w4a4(Int4(), n=128, k=128, rank=16)
    x = activations(3, 128)
    no_weight = replace(solution, codes=torch.zeros_like(solution.codes), bias=None)
    wanted = x.float() @ solution.down.float().T @ solution.up.float().T
    torch.testing.assert_close(w4a4_exact(x, no_weight), wanted, rtol=0, atol=FLOAT32_SUM)


def test_an_all_zero_token_gives_the_bias():
    layer = W4A4Linear(random_w4a4(NvFp4(), n=128, k=128, rank=16))
    y = layer(torch.zeros(1, 128, dtype=torch.bfloat16))
    assert layer.bias is not None
    assert torch.equal(y[0], layer.bias)


def test_a_nan_in_a_token_stays_in_that_token():
    x = activations(3, 128)
    x[1, 5] = float("nan")
    y = W4A4Linear(random_w4a4(Int4(), n=128, k=128, rank=16))(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", ["int4", "nvfp4", "w4a16"])
def test_a_cached_weight_changes_no_bit(kind):
    solution = (
        random_w4a16(n=128, k=256)
        if kind == "w4a16"
        else random_w4a4(Int4() if kind == "int4" else NvFp4(), n=128, k=256, rank=16)
    )
    x = activations(9, 256)
    kept, remade = quantized_linear(solution), quantized_linear(solution, cache_bytes=0)
    first = kept(x)
    assert kept._cached_weight is not None
    assert remade(x) is not None
    assert remade._cached_weight is None
    assert torch.equal(first, kept(x))
    assert torch.equal(first, remade(x))


def test_to_another_dtype_leaves_the_checkpoints_numbers_alone():
    layer = W4A4Linear(random_w4a4(NvFp4(), n=128, k=128, rank=16))
    before = {name: (t.dtype, t.clone()) for name, t in layer.named_buffers()}
    layer.to(torch.float16).float()
    for name, t in layer.named_buffers():
        assert t.dtype == before[name][0]
        assert torch.equal(t.float(), before[name][1].float())


def test_autocast_does_not_round_the_float32_product():
    layer = W4A4Linear(random_w4a4(Int4(), n=128, k=128, rank=16))
    x = activations(4, 128)
    wanted = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), wanted)


def test_a_module_has_the_features_of_the_linear_it_replaces():
    for layer in (
        W4A4Linear(random_w4a4(Int4(), n=384, k=128, rank=0)),
        W4A16Linear(random_w4a16(n=384, k=128)),
    ):
        assert (layer.in_features, layer.out_features) == (128, 384)
        assert layer(activations(2, 128)).shape == (2, 384)


def test_w4a16_rounds_each_weight_and_the_result_once():
    solution = random_w4a16(n=128, k=256)
    x = activations(2, 256)
    weight = (
        solution.codes.double().unflatten(-1, (-1, 64)) * solution.scales.double().unsqueeze(-1)
        + solution.zeros.double().unsqueeze(-1)
    ).flatten(-2)
    assert solution.bias is not None
    wanted = x.double() @ weight.to(torch.bfloat16).double().T + solution.bias.double()
    # float32 sums may fall on the other side of a bf16 rounding boundary: one bf16 ulp.
    torch.testing.assert_close(w4a16_forward(x, solution).double(), wanted, rtol=2**-8, atol=FLOAT32_SUM)
