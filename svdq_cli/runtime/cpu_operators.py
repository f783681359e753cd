"""The CPU engine as torch operators, `torch.ops.svdq.cpu_*`: what torch.compile keeps in its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svdq_cli.cpu import engine as cpu
from svdq_cli.records import Int4, NvFp4, Precision

_PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (Int4(), NvFp4())}
_library = torch.library.Library("svdq", "FRAGMENT")


def _define(name: str, parameters: str, returns: str, *, shapes: Callable[..., Any]) -> None:
    """`torch.ops.svdq.cpu_<name>`, which is the engine's method of that name."""

    def run(*tensors: Any, **options: Any) -> Any:
        return getattr(cpu.engine(), name)(*tensors, **_with_records(options))

    def under_compile(*tensors: Any, **options: Any) -> Any:
        return shapes(*tensors, **_with_records(options))

    _library.define(f"cpu_{name}({parameters}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(f"cpu_{name}", run, "CPU")
    torch.library.register_fake(f"svdq::cpu_{name}", under_compile, lib=_library)


def _with_records(options: dict[str, Any]) -> dict[str, Any]:
    if "precision" in options:
        options["precision"] = _PRECISIONS[options["precision"]]
    return options


def _quantized_shapes(x: Tensor, smooth: Tensor, down: Tensor, *, precision: Precision, **_: Any):
    m, k = x.shape
    return cpu.new_quantized(m, k, down.shape[1], smooth.dtype, precision)


def _fused_shapes(*tensors: Any, m: int, precision: Precision, **_: Any):
    up, smooth, down = tensors[5], tensors[8], tensors[9]
    return cpu.new_quantized(m, smooth.shape[0], down.shape[1], up.dtype, precision)


def _product_shape(*tensors: Any, m: int, n: int, float32: bool = False, **_: Any):
    up = tensors[5]
    return up.new_empty(m, n, dtype=torch.float32 if float32 else up.dtype)


_LAYER = (
    "Tensor codes, Tensor scales, Tensor hidden, Tensor weight, Tensor weight_scales, Tensor up, Tensor? outer, "
    "Tensor? bias"
)
_define(
    "quantize_down",
    "Tensor x, Tensor smooth, Tensor down, *, str precision, int? unsigned_from=None, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    shapes=_quantized_shapes,
)
_define(
    "w4a4_gemm",
    f"{_LAYER}, *, SymInt m, SymInt n, SymInt k, str precision, bool float32=False",
    "Tensor",
    shapes=_product_shape,
)
_define(
    "w4a4_gelu_quantize",
    f"{_LAYER}, Tensor next_smooth, Tensor next_down, Tensor? before=None, *, SymInt m, SymInt k, str precision, "
    "int? next_unsigned_from=None, float shift=0.0",
    "(Tensor, Tensor, Tensor)",
    shapes=_fused_shapes,
)
_define(
    "w4a16_linear",
    "Tensor x, Tensor weight, Tensor scales, Tensor? bias, *, SymInt n",
    "Tensor",
    shapes=lambda x, weight, scales, bias, *, n: x.new_empty(x.shape[0], n),
)
