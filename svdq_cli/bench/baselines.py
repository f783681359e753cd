"""What others offer for the same linear layer on an NVIDIA GPU. Each says which arithmetic it is; none is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.bench.operations import Operation
from svdq_cli.solve.quantizers import E4M3_MAX

GROUP = 64
INT_MM_ROWS = 16  # torch._int_mm wants more


Make = Callable[[Tensor], Operation]  # from a weight (N, K) on the GPU


def gpu_baselines(m: int) -> Iterator[tuple[str, Make]]:
    """Baselines to measure next to torch's linear for M rows, by name. Each may fail where a GPU or torch lacks it."""
    yield "torch._weight_int4pack_mm", weight_only_int4
    yield "torch._scaled_mm", scaled_mm_fp8
    if m > INT_MM_ROWS:
        yield "torch._int_mm", int8_mm
    yield "bitsandbytes NF4", nf4


class TinyGemm(nn.Module):
    """torch's own 4-bit weights with 16-bit activations."""

    def __init__(self, multiply: Callable[..., Tensor], packed: Tensor, scales_and_zeros: Tensor) -> None:
        super().__init__()
        self.multiply = multiply
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales_and_zeros)

    def forward(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N)."""
        return self.multiply(x, self.get_buffer("packed"), GROUP, self.get_buffer("scales_and_zeros"))


def weight_only_int4(weight: Tensor) -> Operation:
    """`weight` (N, K); codes 0..15, weight = (code - 8) * scale + zero, one scale for 64 columns."""
    codes, scales = _weight_codes(weight)
    shifted = (codes + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(shifted[:, 0::2] << 4 | shifted[:, 1::2], 8)
    return _weight_only(torch._weight_int4pack_mm, packed, codes, scales)


def weight_only_int4_on_cpu(weight: Tensor) -> Operation:
    """The same of a weight (N, K) on a CPU, which has operators of its own, as torchao calls them."""
    codes, scales = _weight_codes(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), 1)
    return _weight_only(torch.ops.aten._weight_int4pack_mm_for_cpu, packed, codes, scales)


def _weight_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -7..7 (N, K) and scales (N, K/64)."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    return (groups / scales.float().unsqueeze(-1)).round().clamp(-7, 7).flatten(-2), scales


def _weight_only(multiply: Callable[..., Tensor], packed: Tensor, codes: Tensor, scales: Tensor) -> Operation:
    pairs = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    values = codes.unflatten(-1, (-1, GROUP)).double() * scales.double().unsqueeze(-1)
    return Operation(
        "linear",
        "torch",
        "w4a16 int4",
        None,
        torch.bfloat16,
        TinyGemm(multiply, packed, pairs),
        lambda x: x.double() @ values.flatten(-2).T,
        "4-bit weights, bfloat16 activations; result rounded to bfloat16",
    )


class ScaledMm(nn.Module):
    """fp8 product with a scale for every row of both sides."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, x_scales: Tensor) -> Tensor:
        """(M, K) float8 and its scales (M, 1) -> (M, N)."""
        return torch._scaled_mm(
            x,
            self.get_buffer("weight").t(),
            scale_a=x_scales,
            scale_b=self.get_buffer("scales").t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


def scaled_mm_fp8(weight: Tensor) -> Operation:
    """The product alone: activations are converted outside the measured time. `weight` is (N, K)."""

    def rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
        scales = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
        return (x.float() / scales).to(torch.float8_e4m3fn), scales

    stored, scales = rows_to_fp8(weight)

    def define(x: Tensor) -> Tensor:
        rows, row_scales = rows_to_fp8(x)
        return (rows.double() @ stored.double().T) * row_scales.double() * scales.double().T

    return Operation(
        "gemm",
        "torch",
        "fp8 e4m3",
        None,
        torch.bfloat16,
        ScaledMm(stored, scales),
        define,
        "e4m3 operands, fast accumulation; result rounded to bfloat16",
        prepare=rows_to_fp8,
    )


class Int8Mm(nn.Module):
    """int8 product with int32 results, unscaled."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """(M, K) int8 -> (M, N) int32."""
        return torch._int_mm(x, self.get_buffer("weight").t())


def int8_mm(weight: Tensor) -> Operation:
    """The product alone: activations are converted outside the measured time, results are left as integers. `weight`
    is (N, K)."""

    def to_int8(x: Tensor) -> tuple[Tensor, ...]:
        return ((x.float() * (127 / x.float().abs().amax(-1, keepdim=True))).round().to(torch.int8),)

    (stored,) = to_int8(weight)
    return Operation(
        "gemm",
        "torch",
        "int8",
        None,
        torch.bfloat16,
        Int8Mm(stored),
        lambda x: to_int8(x)[0].double() @ stored.double().T,
        "exact integers, not scaled",
        prepare=to_int8,
    )


def nf4(weight: Tensor) -> Operation:
    """The paper's baseline: bitsandbytes' NF4 weights with bfloat16 activations. `weight` is (N, K)."""
    import bitsandbytes  # type: ignore[import-not-found]
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

    n, k = weight.shape
    library: Any = bitsandbytes.nn  # whose types name neither `quant_type` nor what a weight carries
    module = library.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="cpu"
    )
    module.weight = library.Params4bit(weight.bfloat16().cpu(), requires_grad=False, quant_type="nf4")
    module = module.to(weight.device)
    values = dequantize_4bit(module.weight.data, module.weight.quant_state).double()
    return Operation(
        "linear",
        "bitsandbytes",
        "w4a16 nf4",
        None,
        torch.bfloat16,
        module,
        lambda x: x.double() @ values.T,
        "4-bit weights, bfloat16 activations; result rounded to bfloat16",
    )
