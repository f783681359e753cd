"""Operators of torch, `torch.ops.svdq.*`: what torch.compile keeps in its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from svdq_cli.cpu.engine import engine
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
    """`torch.ops.svdq.<name>`: on a GPU the kernel's launch, on a CPU its reference.

    Parameters after `*` are passed by keyword to all three.

    `gather`: the tensors as these three take them. `records`: by parameter, what finds the record that a word names:
    operators take tensors, words and numbers only.
    """

    def on_gpu(*tensors: Any, **options: Any) -> Any:
        return launch(device_at(tensors[0].device.index), *gather(tensors), **_with_records(options, records))

    def on_cpu(*tensors: Any, **options: Any) -> Any:
        return reference(*gather(tensors), **_with_records(options, records))

    def under_compile(*tensors: Any, **options: Any) -> Any:
        return shapes(*gather(tensors), **_with_records(options, records))

    _library.define(f"{name}({parameters}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"svdq::{name}", under_compile, lib=_library)


def define_cpu(name: str, parameters: str, returns: str, *, shapes: Callable[..., Any]) -> None:
    """`torch.ops.svdq.cpu_<name>`: the CPU engine's method of that name. Its operands are packed in panels
    (`pack.cpu_panels`), and `runtime.cpu_definition` is its reference."""

    def run(*tensors: Any, **options: Any) -> Any:
        return getattr(engine(), name)(*tensors, **_with_records(options, _RECORDS))

    def under_compile(*tensors: Any, **options: Any) -> Any:
        return shapes(*tensors, **_with_records(options, _RECORDS))

    _library.define(f"cpu_{name}({parameters}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(f"cpu_{name}", run, "CPU")
    torch.library.register_fake(f"svdq::cpu_{name}", under_compile, lib=_library)


def _with_records(options: dict[str, Any], records: Mapping[str, Callable[[str], object]]) -> dict[str, Any]:
    return {name: records[name](value) if name in records else value for name, value in options.items()}
