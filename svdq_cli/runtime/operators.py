"""The kernels as torch operators, `torch.ops.svdq.*`: on a GPU the kernel, on a CPU its twin.

Each operator has the name, inputs and outputs of its kernel. Precisions and modes travel by name, as operators take no
records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from svdq_cli.gpu import operations
from svdq_cli.gpu.launch import device_at
from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.runtime import twins

_PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (Int4(), NvFp4())}
_RECORDS: dict[str, Callable[[str], object]] = {"precision": _PRECISIONS.__getitem__}
_library = torch.library.Library("svdq", "DEF")


def define(
    name: str,
    parameters: str,
    returns: str,
    *,
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    shapes: Callable[..., Any],
    records: Mapping[str, Callable[[str], object]] = _RECORDS,
) -> None:
    """`torch.ops.svdq.<name>`. Parameters after `*` are passed by keyword to all three.

    `records`: of parameters that name a record, how it is found: operators take words and numbers only.
    """

    def with_records(options: dict[str, Any]) -> dict[str, Any]:
        return {name: records[name](value) if name in records else value for name, value in options.items()}

    def on_gpu(first: Tensor, *others: Any, **options: Any) -> Any:
        return kernel(device_at(first.device.index), first, *others, **with_records(options))

    def on_cpu(*tensors: Any, **options: Any) -> Any:
        return twin(*tensors, **with_records(options))

    def under_compile(*tensors: Any, **options: Any) -> Any:
        return shapes(*tensors, **with_records(options))

    _library.define(f"{name}({parameters}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"svdq::{name}", under_compile, lib=_library)


def _quantized_shapes(x: Tensor, inverse_smooth: Tensor, down: Tensor, *, precision: Precision, **_: Any):
    (m, k), rank = x.shape, 8 * down.shape[1]
    return operations.new_quantized(x, operations.padded_rows(m), k, rank, precision)


def _product_shape(*tensors: Any, m: int, n: int, **_: Any):
    up = tensors[5]
    return up.new_empty(m, n)


def _fused_shapes(*tensors: Any, precision: Precision, **_: Any):
    codes, up, next_inverse_smooth, next_down = tensors[0], tensors[5], tensors[8], tensors[9]
    rank = 8 * next_down.shape[1]
    return operations.new_quantized(up, 16 * codes.shape[1], next_inverse_smooth.shape[0], rank, precision)


_LAYER = (
    "Tensor codes, Tensor scales, Tensor hidden, Tensor weight, Tensor weight_scales, Tensor up, Tensor? outer, "
    "Tensor? bias"
)
define(
    "quantize_down",
    "Tensor x, Tensor inverse_smooth, Tensor down, *, str precision, bool unsigned=False, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    kernel=operations.quantize_down,
    twin=twins.quantize_down,
    shapes=_quantized_shapes,
)
define(
    "w4a4_gemm",
    f"{_LAYER}, *, SymInt m, SymInt n, str precision, bool unsigned=False",
    "Tensor",
    kernel=operations.w4a4_gemm,
    twin=twins.w4a4_gemm,
    shapes=_product_shape,
)
define(
    "w4a4_gelu_quantize",
    f"{_LAYER}, Tensor next_inverse_smooth, Tensor next_down, *, SymInt m, str precision, bool unsigned=False, "
    "bool next_unsigned=False, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    kernel=operations.w4a4_gelu_quantize,
    twin=twins.w4a4_gelu_quantize,
    shapes=_fused_shapes,
)
define(
    "w4a16_linear",
    "Tensor x, Tensor weight, Tensor scales, Tensor? bias, *, SymInt n",
    "Tensor",
    kernel=operations.w4a16_linear,
    twin=twins.w4a16_linear,
    shapes=lambda x, weight, scales, bias, *, n: x.new_empty(x.shape[0], n),
)
