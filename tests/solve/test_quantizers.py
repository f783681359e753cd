"""The number formats against golden vectors of another tool (tests/golden/README.md), and their edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.runtime.naive import published_rounding
from svdq_cli.solve.quantizers import (
    E2M1,
    QuantizedWeight,
    decode_e2m1,
    dequantize_weight,
    encode_e2m1,
    fake_quantize_activation,
    quantize_activation,
    quantize_weight,
    round_e2m1_to_even,
)

GOLDEN = Path(__file__).parents[1] / "golden"
LAYERS = sorted(path.stem for path in GOLDEN.glob("e2e_*.safetensors"))
BOTH: tuple[Precision, ...] = (Int4(), NvFp4())


def precision_of(name: str) -> Precision:
    return NvFp4() if "nvfp4" in name else Int4()


def residual_of(file: dict[str, Tensor]) -> Tensor:
    """(N, K) bfloat16: smoothed weight less the low-rank product, each rounded as the exporter rounded it."""
    if "in.residual" in file:
        return file["in.residual"]
    smoothed = file["in.weight"] * file["in.smooth"]
    return (smoothed - file["in.lora_b"].float() @ file["in.lora_a"].float()).to(torch.bfloat16)


@pytest.mark.parametrize("name", LAYERS)
def test_quantized_residuals_are_the_golden_codes_and_scales(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    residual = residual_of(file).float()
    sources = residual.chunk(3) if "channel" in name else (residual,)  # q, k and v each have an outer scale
    parts = [published_rounding(part, precision_of(name), dtype=torch.bfloat16) for part in sources]
    assert torch.equal(torch.cat([part.codes for part in parts]), file["ref.codes"])
    scales = torch.cat([part.scales for part in parts])
    assert scales.dtype == file["ref.scales"].dtype
    assert torch.equal(scales.float(), file["ref.scales"].float())
    if "ref.outer_scale" in file:
        outers = [part.outer.expand(len(part.codes)) for part in parts if part.outer is not None]
        expected = file["ref.outer_scale"].flatten().expand(len(residual))
        assert torch.equal(torch.cat(outers), expected)


@pytest.mark.parametrize("name", [name for name in LAYERS if "int4" in name])
def test_codes_to_minus_8_with_signed_scales_lose_less_than_the_golden_ones(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    residual = residual_of(file).float()
    golden = QuantizedWeight(file["ref.codes"], file["ref.scales"], None)
    own = quantize_weight(residual, Int4(), dtype=torch.bfloat16)
    assert int(own.codes.min()) == -8
    assert bool((own.scales < 0).any())
    lost = [float((dequantize_weight(each, Int4()) - residual).norm()) for each in (own, golden)]
    assert lost[0] < 0.92 * lost[1], "a step is 1/8 of a group's largest weight, less what is clipped of it"


@pytest.mark.parametrize("name", LAYERS)
def test_quantized_activations_are_the_golden_codes_and_scales(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    precision, shifted = precision_of(name), "in.shift" in file
    x = file["x"] + file["in.shift"] if shifted else file["x"]
    codes, scales = quantize_activation(x / file["in.smooth"], precision, unsigned=shifted)
    golden = file["run.act_codes"]
    assert torch.equal(codes, decode_e2m1(golden) if isinstance(precision, NvFp4) else golden.float())
    assert torch.equal(scales, file["run.act_scales"].float())


@pytest.mark.parametrize("name", LAYERS)
def test_the_formula_of_the_layer_gives_the_golden_output(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    precision, shifted = precision_of(name), "in.shift" in file
    x = file["x"] + file["in.shift"] if shifted else file["x"]
    activation = fake_quantize_activation(x / file["in.smooth"], precision, unsigned=shifted).double()
    scales = file["ref.scales"].double()
    if "ref.outer_scale" in file:
        scales = scales * file["ref.outer_scale"].double()
    values = decode_e2m1(file["ref.codes"]) if isinstance(precision, NvFp4) else file["ref.codes"]
    weight = (values.double().unflatten(1, (-1, precision.group)) * scales.unsqueeze(-1)).flatten(1)
    branch = file["x"].double() @ file["stored.lora_down"].double().T @ file["in.lora_b"].double().T
    y = activation @ weight.T + branch + file["stored.bias"].double()
    # The golden run rounds the low-rank activation to bfloat16 (2^-9 relative) before it goes up again.
    torch.testing.assert_close(y.float(), file["y_f32"], rtol=0, atol=2**-8 * float(branch.abs().max()))


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("shape", [(1, 64), (17, 128), (129, 64)])
def test_dequantized_weights_are_within_half_a_step(precision: Precision, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, precision, dtype=torch.bfloat16)
    error = (dequantize_weight(quantized, precision) - weight).unflatten(1, (-1, precision.group)).abs()
    peak = weight.unflatten(1, (-1, precision.group)).abs().amax(-1, keepdim=True)
    # nvfp4: half of the widest step, 2/5 of the peak where it becomes 5, and a scale in e4m3. int4: half a step is
    # 0.95/16 of the peak, but a weight of the other sign that is as large is clipped at 7 of 8/0.95 steps.
    widest = peak * (1 - 7 * 0.95 / 8) * 1.1 if isinstance(precision, Int4) else peak / 5 * 1.1
    assert bool((error <= widest).all())
    if isinstance(precision, Int4):
        clipped = (quantized.codes == 7) | (quantized.codes == -8)
        free = error.masked_fill(clipped.unflatten(1, (-1, 64)), 0)
        # The scale is fitted to the codes after they are chosen, which moves the largest by a few percent.
        assert bool((free <= peak * 0.95 / 16 * 1.3).all())


@pytest.mark.parametrize("precision", BOTH)
def test_an_all_zero_weight_gets_positive_scales_and_zero_codes(precision: Precision) -> None:
    quantized = quantize_weight(torch.zeros(3, 64), precision, dtype=torch.bfloat16)
    assert not quantized.codes.any()
    assert bool((quantized.scales.float() > 0).all())
    assert quantized.outer is None or bool((quantized.outer > 0).all())


@pytest.mark.parametrize("precision", BOTH)
def test_an_all_zero_token_quantizes_to_zero(precision: Precision) -> None:
    codes, scales = quantize_activation(torch.zeros(2, 64, dtype=torch.bfloat16), precision)
    assert not codes.any()
    assert not scales.any()


def test_a_micro_scale_never_rounds_to_zero() -> None:
    weight = torch.full((1, 32), 1e-9)
    weight[0, 16:] = 1.0
    quantized = quantize_weight(weight, NvFp4(), dtype=torch.bfloat16)
    assert bool((quantized.scales.float() > 0).all())
    assert not quantized.codes[0, :16].any()


def test_stored_e2m1_ties_go_toward_zero_and_zero_has_no_sign() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert encode_e2m1(ties).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert encode_e2m1(-ties).tolist() == [0, 9, 10, 11, 12, 13, 14]
    assert encode_e2m1(torch.tensor([-0.0, -0.2, 9.0, -9.0])).tolist() == [0, 0, 7, 15]


def test_activation_e2m1_ties_go_to_even_mantissas() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert round_e2m1_to_even(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_every_e2m1_value_decodes_to_itself() -> None:
    codes = torch.arange(16)
    values = decode_e2m1(codes)
    assert values.tolist() == list(E2M1) + [-m for m in E2M1]
    assert encode_e2m1(values).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]


def test_an_nvfp4_group_takes_the_scale_that_loses_least():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    def lost(shares: tuple[float, ...]) -> torch.Tensor:
        found = quantize_weight(weight, NvFp4(), dtype=torch.bfloat16, nvfp4_shares=shares)
        return (dequantize_weight(found, NvFp4()) - weight).reshape(256, -1, 16).square().sum(-1)

    both, six, four = lost((1.0, 1.5)), lost((1.0,)), lost((1.5,))
    torch.testing.assert_close(both, torch.minimum(six, four))
    assert both.sum() < 0.93 * six.sum()
