"""A second's proof that each kernel runs here: every operation, precision and mode against its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher
from svdq_cli.records import GELU_SHIFT, Int4, NvFp4, Precision
from svdq_cli.runtime import ops  # defines torch.ops.svdq
from svdq_cli.runtime.operands import W4A4Operands, W4A16Operands, pack_w4a4, pack_w4a16, tensors_of
from svdq_cli.runtime.sample_layers import RANK, draw, sample_w4a4, sample_w4a16

M, K, N = 130, 256, 256  # two blocks of rows, one of them almost empty
# Of large blocks: a whole one and half of one, and steps that go round their ring
LARGE_M, LARGE_K = 300, 448
# Kernel and reference differ where a sum in another order rounds to the neighboring 16-bit number or code.
MOST_ERROR = 2e-3
MOST_CODES = 0.02  # share that may differ, where the quantizer's input is itself such a sum


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One operation in one precision and mode."""

    op: str
    precision: str
    mode: str
    variant: Callable[[Architecture], Variant]
    disagreement: Callable[[Launcher, torch.device], float]  # with the reference: a share or a relative error
    most: float


def portable_cases(dtype: torch.dtype) -> Iterator[KernelCase]:
    """Everything that the kernels of all cards offer, in the 16-bit dtype of a checkpoint."""
    for precision in (Int4(), NvFp4()):
        modes = (False, True) if isinstance(precision, Int4) else (False,)
        for unsigned in modes:
            yield _quantize_case(precision, dtype, unsigned)
            yield _gemm_case(precision, dtype, unsigned)
            yield _fused_case(precision, dtype, unsigned)
    yield _w4a16_case(dtype)


def large_block_cases(dtype: torch.dtype, kind: Architecture) -> Iterator[KernelCase]:
    """The GEMM's large blocks against those of BLOCK_M rows, where a card has any: they give the same bits."""
    for precision in (Int4(), NvFp4()):
        if variants.has_large_blocks(precision, kind):
            for unsigned in (False, True) if isinstance(precision, Int4) else (False,):
                yield _large_gemm_case(precision, dtype, unsigned)
                yield _large_fused_case(precision, dtype, unsigned)


def _quantize_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device)
        x = sample_rows(dtype, device, unsigned)
        how = {"precision": precision, "unsigned": unsigned, "shift": GELU_SHIFT if unsigned else 0.0}
        ours = ops.quantize_down.launch(launcher, x, layer.inverse_smooth, layer.down, **how)
        theirs = ops.quantize_down.reference(x, layer.inverse_smooth, layer.down, **how)
        return quantized_disagreement(ours, theirs)

    def variant(kind: Architecture) -> Variant:
        return ops.quantize_down.variant(dtype, precision, rank=RANK, unsigned=unsigned)

    return KernelCase("quantize_down", precision.name, _mode(unsigned), variant, disagreement, MOST_ERROR)


def _gemm_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device)
        quantized = _quantized(layer, precision, dtype, device, unsigned)
        how = {"m": M, "n": N, "precision": precision, "unsigned": unsigned}
        ours = ops.w4a4_gemm.launch(launcher, quantized, layer.product, **how)
        return relative_error(ours, ops.w4a4_gemm.reference(quantized, layer.product, **how))

    def variant(kind: Architecture) -> Variant:
        return ops.w4a4_gemm.variant(
            dtype, precision, kind, block_m=variants.block_rows(M), unsigned=unsigned
        )

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
        tensors = (quantized, layer.product, layer.input)
        ours = ops.w4a4_gelu_quantize.launch(launcher, *tensors, **how)
        return quantized_disagreement(ours, ops.w4a4_gelu_quantize.reference(*tensors, **how))

    def variant(kind: Architecture) -> Variant:
        return ops.w4a4_gelu_quantize.variant(
            dtype, precision, kind, block_m=variants.block_rows(M), next_unsigned=unsigned
        )

    mode = f"to {_mode(unsigned)}"
    return KernelCase("w4a4_gelu_quantize", precision.name, mode, variant, disagreement, MOST_CODES)


def _large_gemm_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device, k=LARGE_K)
        quantized = _quantized(layer, precision, dtype, device, unsigned, m=LARGE_M)
        how = {"m": LARGE_M, "n": N, "precision": precision, "unsigned": unsigned}
        ours, known = (
            ops.w4a4_gemm.launch(launcher, quantized, layer.product, **how, block_m=block_m)
            for block_m in (variants.LARGE_BLOCK_M, variants.BLOCK_M)
        )
        return share_of_other_bits((ours,), (known,))

    def variant(kind: Architecture) -> Variant:
        return ops.w4a4_gemm.variant(
            dtype, precision, kind, block_m=variants.LARGE_BLOCK_M, unsigned=unsigned
        )

    return KernelCase(
        "w4a4_gemm", precision.name, f"large blocks, {_mode(unsigned)}", variant, disagreement, 0.0
    )


def _large_fused_case(precision: Precision, dtype: torch.dtype, unsigned: bool) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _layer(precision, dtype, device, k=LARGE_K)
        after = _layer(precision, dtype, device)
        quantized = _quantized(layer, precision, dtype, device, unsigned=False, m=LARGE_M)
        how = {
            **{"m": LARGE_M, "precision": precision, "next_unsigned": unsigned},
            "shift": GELU_SHIFT if unsigned else 0.0,
        }
        ours, known = (
            ops.w4a4_gelu_quantize.launch(
                launcher, quantized, layer.product, after.input, **how, block_m=block_m
            )
            for block_m in (variants.LARGE_BLOCK_M, variants.BLOCK_M)
        )
        return share_of_other_bits(ours, known)

    def variant(kind: Architecture) -> Variant:
        return ops.w4a4_gelu_quantize.variant(
            dtype, precision, kind, block_m=variants.LARGE_BLOCK_M, next_unsigned=unsigned
        )

    mode = f"large blocks, to {_mode(unsigned)}"
    return KernelCase("w4a4_gelu_quantize", precision.name, mode, variant, disagreement, 0.0)


def _w4a16_case(dtype: torch.dtype) -> KernelCase:
    def disagreement(launcher: Launcher, device: torch.device) -> float:
        layer = _modulation(dtype, device)
        x = sample_rows(dtype, device, unsigned=False)[:3]
        tensors = (x, layer.weight, layer.scales, layer.bias)
        return relative_error(
            ops.w4a16_linear.launch(launcher, *tensors, n=N), ops.w4a16_linear.reference(*tensors, n=N)
        )

    def variant(kind: Architecture) -> Variant:
        return ops.w4a16_linear.variant(dtype)

    return KernelCase("w4a16_linear", "int4", "-", variant, disagreement, MOST_ERROR)


def _mode(unsigned: bool) -> str:
    return "unsigned" if unsigned else "signed"


def _layer(precision: Precision, dtype: torch.dtype, device: torch.device, *, k: int = K) -> W4A4Operands:
    packed = tensors_of(pack_w4a4(sample_w4a4(precision, dtype, k=k, n=N)))
    return W4A4Operands(**{name: moved(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]


def _modulation(dtype: torch.dtype, device: torch.device) -> W4A16Operands:
    packed = tensors_of(pack_w4a16(sample_w4a16(dtype, k=K, n=N)))
    return W4A16Operands(**{name: moved(tensor, device) for name, tensor in packed.items()})  # type: ignore[arg-type]


def _quantized(
    layer: W4A4Operands,
    precision: Precision,
    dtype: torch.dtype,
    device: torch.device,
    unsigned: bool,
    *,
    m: int = M,
) -> tuple[Tensor, Tensor, Tensor]:
    x = sample_rows(dtype, device, unsigned, m=m, k=layer.inverse_smooth.shape[0])
    return ops.quantize_down.reference(
        x, layer.inverse_smooth, layer.down, precision=precision, unsigned=unsigned
    )


def sample_rows(
    dtype: torch.dtype, device: torch.device, unsigned: bool, *, m: int = M, k: int = K
) -> Tensor:
    """Its input, (M, K); positive where `unsigned`."""
    x = draw(0, m, k).to(dtype).to(device)
    return x.abs() if unsigned else x


def moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """On the device, where there is a tensor. Of any shape."""
    return None if tensor is None else tensor.to(device)


def quantized_disagreement(
    ours: tuple[Tensor, Tensor, Tensor], theirs: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The worst of: shares of codes and of scales that differ, relative error of the hidden vectors. NaN if one is.
    Both of the same shapes, any shape."""
    shares = [float((a != b).float().mean()) for a, b in zip(ours[:2], theirs[:2], strict=True)]
    return float(torch.tensor([*shares, relative_error(ours[2], theirs[2])], dtype=torch.float32).max())


def share_of_other_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest share of a tensor's bytes that are others than those of its counterpart. Of any shape."""
    return max(
        float((a.view(torch.uint8) != b.view(torch.uint8)).float().mean())
        for a, b in zip(ours, theirs, strict=True)
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of `theirs`, of one shape. Of any shape."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
