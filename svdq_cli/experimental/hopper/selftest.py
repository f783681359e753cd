"""A second's proof that Hopper's own kernels run here: every operation in every mode against its reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from svdq_cli.experimental.hopper import operations, reference
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import HopperOperands, pack_hopper
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher
from svdq_cli.records import Int4
from svdq_cli.runtime.operands import tensors_of
from svdq_cli.runtime.selftest import (
    MOST_CODES,
    MOST_ERROR,
    RANK,
    KernelCase,
    M,
    N,
    moved,
    portable_cases,
    quantized_disagreement,
    relative_error,
    sample_rows,
    sample_solution,
)

MOST_FP8_ERROR = 3e-3  # in modes whose sums keep about 14 bits


def kernel_cases(dtype: torch.dtype, kind: Architecture) -> Iterator[KernelCase]:
    """Everything that kernels offer on a card, Hopper's own included, in the 16-bit dtype of a checkpoint."""
    yield from portable_cases(dtype)
    if kind.hopper_modes:
        for mode in HopperMode:
            yield _quantize_case(dtype, mode)
            yield _gemm_case(dtype, mode)
        yield _fused_case(dtype)


def _quantize_case(dtype: torch.dtype, mode: HopperMode) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _layer(mode, dtype, device), sample_rows(dtype, device, unsigned=False)
        tensors = (x, layer.inverse_smooth, layer.down)
        ours = operations.quantize_down(launcher, *tensors, mode=mode)
        return quantized_disagreement(ours, reference.quantize_down(*tensors, mode=mode))

    def variant(kind: Architecture) -> Variant:
        return operations.quantize_down_variant(dtype, mode, tokens=operations.token_tile(M), rank=RANK)

    return KernelCase("hopper_quantize_down", "int4", mode.label, variant, disagreement, MOST_ERROR)


def _gemm_case(dtype: torch.dtype, mode: HopperMode) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _layer(mode, dtype, device), sample_rows(dtype, device, unsigned=False)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        how = {"m": M, "n": N, "mode": mode}
        ours = operations.gemm(launcher, *quantized, *layer.product, **how)
        return relative_error(ours, reference.gemm(*quantized, *layer.product, **how))

    def variant(kind: Architecture) -> Variant:
        return operations.gemm_variant(dtype, mode, tokens=operations.token_tile(M))

    most = MOST_ERROR if mode == HopperMode.EXACT else MOST_FP8_ERROR
    return KernelCase("hopper_gemm", "int4", mode.label, variant, disagreement, most)


def _fused_case(dtype: torch.dtype) -> KernelCase:
    mode = HopperMode.EXACT

    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _layer(mode, dtype, device), sample_rows(dtype, device, unsigned=False)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        tensors = (*quantized, *layer.product, layer.inverse_smooth, layer.down)
        ours = operations.gelu_quantize(launcher, *tensors, m=M)
        return quantized_disagreement(ours, reference.gelu_quantize(*tensors, m=M))

    def variant(kind: Architecture) -> Variant:
        return operations.gelu_quantize_variant(dtype, tokens=operations.token_tile(M))

    return KernelCase("hopper_gelu_quantize", "int4", mode.label, variant, disagreement, MOST_CODES)


def _layer(mode: HopperMode, dtype: torch.dtype, device: torch.device) -> HopperOperands:
    packed = tensors_of(pack_hopper(sample_solution(Int4(), dtype), mode))
    return HopperOperands(**{name: moved(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]
