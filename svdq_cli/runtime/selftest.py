"""A second's proof that each kernel runs here: every operation, precision and mode against its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_cli.gpu import hopper, operations, variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.hopper_modes import HopperMode
from svdq_cli.gpu.operations import Launcher
from svdq_cli.records import (
    GELU_SHIFT,
    Int4,
    Linear,
    NvFp4,
    Precision,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.runtime import hopper_twins, twins
from svdq_cli.runtime.hopper_operands import HopperOperands, pack_hopper
from svdq_cli.runtime.naive import naive_solution
from svdq_cli.runtime.operands import W4A4Operands, W4A16Operands, pack_w4a4, pack_w4a16, tensors_of

M, K, N, RANK = 130, 256, 256, 32  # two blocks of rows, one of them almost empty
# Kernel and twin differ where a sum in another order rounds to the neighboring 16-bit number, or a code to its own.
MOST_ERROR = 2e-3
MOST_CODES = 0.02  # share that may differ, where the quantizer's input is itself such a sum
MOST_FP8_ERROR = 3e-3  # in modes whose sums keep about 14 bits


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One operation in one precision and mode."""

    op: str
    precision: str
    mode: str
    variant: Callable[[Architecture], Variant]
    disagreement: Callable[[Launcher, torch.device], float]  # with the twin: a share or a relative error
    most: float


def kernel_cases(dtype: torch.dtype, kind: Architecture) -> Iterator[KernelCase]:
    """Everything the kernels offer on a card, in the 16-bit dtype of a checkpoint."""
    yield from _portable_cases(dtype)
    if kind.hopper_modes:
        for mode in HopperMode:
            yield _hopper_quantize_case(dtype, mode)
            yield _hopper_gemm_case(dtype, mode)
        yield _hopper_fused_case(dtype)


def _portable_cases(dtype: torch.dtype) -> Iterator[KernelCase]:
    for precision in (Int4(), NvFp4()):
        modes = (False, True) if isinstance(precision, Int4) else (False,)
        for unsigned in modes:
            yield _quantize_case(precision, dtype, unsigned)
            yield _gemm_case(precision, dtype, unsigned)
            yield _fused_case(precision, dtype, unsigned)
    yield _w4a16_case(dtype)


def _quantize_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device)
        x = _rows(dtype, device, unsigned)
        how = {"precision": precision, "unsigned": unsigned, "shift": GELU_SHIFT if unsigned else 0.0}
        ours = operations.quantize_down(launcher, x, layer.inverse_smooth, layer.down, **how)
        theirs = twins.quantize_down(x, layer.inverse_smooth, layer.down, **how)
        return _quantized_disagreement(ours, theirs)

    def variant(kind: Architecture) -> Variant:
        return variants.quantize_down(dtype, precision, rank=RANK, unsigned=unsigned)

    return KernelCase("quantize_down", precision.name, _mode(unsigned), variant, disagreement, MOST_ERROR)


def _gemm_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device)
        quantized = _quantized(layer, precision, dtype, device, unsigned)
        how = {"m": M, "n": N, "precision": precision, "unsigned": unsigned}
        ours = operations.w4a4_gemm(launcher, *quantized, *layer.product, **how)
        return _relative(ours, twins.w4a4_gemm(*quantized, *layer.product, **how))

    def variant(kind: Architecture) -> Variant:
        return variants.w4a4_gemm(dtype, precision, kind, block_m=variants.block_rows(M), unsigned=unsigned)

    return KernelCase("w4a4_gemm", precision.name, _mode(unsigned), variant, disagreement, MOST_ERROR)


def _fused_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device)
        quantized = _quantized(layer, precision, dtype, device, unsigned=False)
        how = {
            "m": M,
            "precision": precision,
            "next_unsigned": unsigned,
            "shift": GELU_SHIFT if unsigned else 0.0,
        }
        tensors = (*quantized, *layer.product, layer.inverse_smooth, layer.down)
        ours = operations.w4a4_gelu_quantize(launcher, *tensors, **how)
        return _quantized_disagreement(ours, twins.w4a4_gelu_quantize(*tensors, **how))

    def variant(kind: Architecture) -> Variant:
        return variants.w4a4_gelu_quantize(
            dtype, precision, kind, block_m=variants.block_rows(M), next_unsigned=unsigned
        )

    mode = f"to {_mode(unsigned)}"
    return KernelCase("w4a4_gelu_quantize", precision.name, mode, variant, disagreement, MOST_CODES)


def _w4a16_case(dtype: torch.dtype) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _modulation(dtype, device)
        x = _rows(dtype, device, unsigned=False)[:3]
        tensors = (x, layer.weight, layer.scales, layer.bias)
        return _relative(operations.w4a16_linear(launcher, *tensors, n=N), twins.w4a16_linear(*tensors, n=N))

    def variant(kind: Architecture) -> Variant:
        return variants.w4a16_linear(dtype)

    return KernelCase("w4a16_linear", "int4", "-", variant, disagreement, MOST_ERROR)


def _hopper_quantize_case(dtype: torch.dtype, mode: HopperMode) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _hopper_layer(mode, dtype, device), _rows(dtype, device, unsigned=False)
        tensors = (x, layer.inverse_smooth, layer.down)
        ours = hopper.quantize_down(launcher, *tensors, mode=mode)
        return _quantized_disagreement(ours, hopper_twins.quantize_down(*tensors, mode=mode))

    def variant(kind: Architecture) -> Variant:
        return hopper.quantize_down_variant(dtype, mode, tokens=hopper.token_tile(M), rank=RANK)

    return KernelCase("hopper_quantize_down", "int4", mode.label, variant, disagreement, MOST_ERROR)


def _hopper_gemm_case(dtype: torch.dtype, mode: HopperMode) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _hopper_layer(mode, dtype, device), _rows(dtype, device, unsigned=False)
        quantized = hopper_twins.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        how = {"m": M, "n": N, "mode": mode}
        ours = hopper.gemm(launcher, *quantized, *layer.product, **how)
        return _relative(ours, hopper_twins.gemm(*quantized, *layer.product, **how))

    def variant(kind: Architecture) -> Variant:
        return hopper.gemm_variant(dtype, mode, tokens=hopper.token_tile(M))

    most = MOST_ERROR if mode == HopperMode.EXACT else MOST_FP8_ERROR
    return KernelCase("hopper_gemm", "int4", mode.label, variant, disagreement, most)


def _hopper_fused_case(dtype: torch.dtype) -> KernelCase:
    mode = HopperMode.EXACT

    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _hopper_layer(mode, dtype, device), _rows(dtype, device, unsigned=False)
        quantized = hopper_twins.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        tensors = (*quantized, *layer.product, layer.inverse_smooth, layer.down)
        ours = hopper.gelu_quantize(launcher, *tensors, m=M)
        return _quantized_disagreement(ours, hopper_twins.gelu_quantize(*tensors, m=M))

    def variant(kind: Architecture) -> Variant:
        return hopper.gelu_quantize_variant(dtype, tokens=hopper.token_tile(M))

    return KernelCase("hopper_gelu_quantize", "int4", mode.label, variant, disagreement, MOST_CODES)


def _mode(unsigned: bool) -> str:
    return "unsigned" if unsigned else "signed"


def _layer(precision: Precision, dtype: torch.dtype, device: torch.device) -> W4A4Operands:
    packed = tensors_of(pack_w4a4(_solution(precision, dtype)))
    return W4A4Operands(**{name: _on(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]


def _hopper_layer(mode: HopperMode, dtype: torch.dtype, device: torch.device) -> HopperOperands:
    packed = tensors_of(pack_hopper(_solution(Int4(), dtype), mode))
    return HopperOperands(**{name: _on(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]


def _solution(precision: Precision, dtype: torch.dtype) -> W4A4Solution:
    plan = W4A4Plan(Linear("self-test", K, N, bias=True), precision, RANK)
    naive = naive_solution(plan, _draw(1, N, K) / K**0.5, _draw(2, N), dtype)
    return replace(
        naive,
        plan=plan,
        smooth=(_draw(3, K).abs() + 0.5).to(dtype),
        down=(_draw(4, RANK, K) / K**0.5).to(dtype),
        up=(_draw(5, N, RANK) / 8).to(dtype),
    )


def _modulation(dtype: torch.dtype, device: torch.device) -> W4A16Operands:
    scales = (_draw(6, N, K // 64).abs() / 100).to(dtype)
    codes = torch.arange(N * K).reshape(N, K).remainder(13).to(torch.uint8)
    plan = W4A16Plan(Linear("self-test", K, N, bias=True))
    packed = tensors_of(pack_w4a16(W4A16Solution(plan, codes, scales, -7 * scales, _draw(7, N).to(dtype))))
    return W4A16Operands(**{name: _on(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]


def _quantized(
    layer: W4A4Operands, precision: Precision, dtype: torch.dtype, device: torch.device, unsigned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = _rows(dtype, device, unsigned)
    return twins.quantize_down(x, layer.inverse_smooth, layer.down, precision=precision, unsigned=unsigned)


def _rows(dtype: torch.dtype, device: torch.device, unsigned: bool) -> Tensor:
    x = _draw(0, M, K).to(dtype).to(device)
    return x.abs() if unsigned else x


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _quantized_disagreement(
    ours: tuple[Tensor, Tensor, Tensor], theirs: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The worst of: shares of codes and of scales that differ, relative error of the hidden vectors. NaN if one is."""
    shares = [float((a != b).float().mean()) for a, b in zip(ours[:2], theirs[:2], strict=True)]
    return float(torch.tensor([*shares, _relative(ours[2], theirs[2])]).max())


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
