"""A second's proof that Hopper's own kernels run here: every operation in every mode against its reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from svdq_cli.experimental.hopper import operations, reference
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.operands import HopperOperands, pack_hopper
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Argument, Launcher
from svdq_cli.records import Int4
from svdq_cli.runtime.operands import tensors_of
from svdq_cli.runtime.sample_layers import RANK, sample_w4a4
from svdq_cli.runtime.selftest import (
    MOST_CODES,
    MOST_ERROR,
    K,
    KernelCase,
    M,
    N,
    moved,
    portable_cases,
    quantized_disagreement,
    relative_error,
    sample_rows,
)

SMALL_M = 100  # for which the tile is the small one
RING_K, RING_N = 448, 384  # 7 groups, the last stage half full, and a rank step: 5 stages a tile, 3 tiles
MOST_FP8_ERROR = 3e-3  # in modes whose sums keep about 14 bits


@dataclass(frozen=True, slots=True)
class OneBlock:
    """A GPU, all of whose tiles are one block's."""

    launcher: Launcher
    multiprocessors: int = 1

    @property
    def architecture(self) -> Architecture:
        return self.launcher.architecture

    @property
    def large_blocks(self) -> bool:
        return self.launcher.large_blocks

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], threads: int, *arguments: Argument
    ) -> None:
        self.launcher.launch(variant, grid, threads, *arguments)


def kernel_cases(dtype: torch.dtype, kind: Architecture) -> Iterator[KernelCase]:
    """Everything that kernels offer on a card, Hopper's own included, in the 16-bit dtype of a checkpoint."""
    yield from portable_cases(dtype)
    if kind.hopper_modes:
        for mode in HopperMode:
            yield _quantize_case(dtype, mode)
            for m in (M, SMALL_M):
                yield _gemm_case(dtype, mode, m)
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


def _gemm_case(dtype: torch.dtype, mode: HopperMode, m: int) -> KernelCase:
    """Few blocks for many tiles: each goes round its ring more than twice, so that every barrier's parity returns."""
    tokens = operations.token_tile(m)

    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(mode, dtype, device, k=RING_K, n=RING_N)
        x = sample_rows(dtype, device, unsigned=False, m=m, k=RING_K)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        how = {"m": m, "n": RING_N, "mode": mode}
        ours = operations.gemm(OneBlock(launcher), quantized, layer.product, **how)
        return relative_error(ours, reference.gemm(quantized, layer.product, **how))

    def variant(kind: Architecture) -> Variant:
        return operations.gemm_variant(dtype, mode, tokens=tokens)

    most = MOST_ERROR if mode == HopperMode.EXACT else MOST_FP8_ERROR
    name = mode.label if tokens == operations.TOKENS else f"{mode.label}, {tokens} tokens"
    return KernelCase("hopper_gemm", "int4", name, variant, disagreement, most)


def _fused_case(dtype: torch.dtype) -> KernelCase:
    mode = HopperMode.EXACT

    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer, x = _layer(mode, dtype, device), sample_rows(dtype, device, unsigned=False)
        quantized = reference.quantize_down(x, layer.inverse_smooth, layer.down, mode=mode)
        tensors = (quantized, layer.product, layer.input)
        ours = operations.gelu_quantize(launcher, *tensors, m=M)
        return quantized_disagreement(ours, reference.gelu_quantize(*tensors, m=M))

    def variant(kind: Architecture) -> Variant:
        return operations.gelu_quantize_variant(dtype, tokens=operations.token_tile(M))

    return KernelCase("hopper_gelu_quantize", "int4", mode.label, variant, disagreement, MOST_CODES)


def _layer(
    mode: HopperMode, dtype: torch.dtype, device: torch.device, *, k: int = K, n: int = N
) -> HopperOperands:
    packed = tensors_of(pack_hopper(sample_w4a4(Int4(), dtype, k=k, n=n), mode))
    return HopperOperands(**{name: moved(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]
