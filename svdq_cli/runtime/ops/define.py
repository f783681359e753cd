"""An operator of torch, `torch.ops.svdq.*`: on a GPU the kernel's launch, on a CPU its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from svdq_cli.gpu.launch import device_at
from svdq_cli.records import Int4, NvFp4, Precision

_PRECISIONS: dict[str, Precision] = {precision.name: precision for precision in (Int4(), NvFp4())}
_RECORDS: dict[str, Callable[[str], object]] = {"precision": _PRECISIONS.__getitem__}
_library = torch.library.Library("svdq", "DEF")


def define(
    name: str,
    parameters: str,
    returns: str,
    *,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    shapes: Callable[..., Any],
    gather: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple,
    records: Mapping[str, Callable[[str], object]] = _RECORDS,
) -> None:
    """`torch.ops.svdq.<name>`. Parameters after `*` are passed by keyword to all three.

    `gather`: the tensors as these three take them. `records`: by parameter, what finds the record that a word names:
    operators take tensors, words and numbers only.
    """

    def with_records(options: dict[str, Any]) -> dict[str, Any]:
        return {name: records[name](value) if name in records else value for name, value in options.items()}

    def on_gpu(*tensors: Any, **options: Any) -> Any:
        return launch(device_at(tensors[0].device.index), *gather(tensors), **with_records(options))

    def on_cpu(*tensors: Any, **options: Any) -> Any:
        return reference(*gather(tensors), **with_records(options))

    def under_compile(*tensors: Any, **options: Any) -> Any:
        return shapes(*gather(tensors), **with_records(options))

    _library.define(f"{name}({parameters}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"svdq::{name}", under_compile, lib=_library)
