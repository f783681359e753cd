"""One NVIDIA GPU as a launcher of kernels: CuPy loads the machine code and launches it on torch's current stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.gpu import nvrtc
from svdq_cli.gpu.architectures import Architecture, architecture_of
from svdq_cli.gpu.compile import Variant, compile_variant
from svdq_cli.gpu.launcher import Argument
from svdq_cli.gpu.verdicts import proven_on


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """Compiles a variant at its first launch and keeps it. A launch waits for nothing and can be captured in a CUDA
    graph; the first one of a variant, which loads code, can't."""

    index: int
    architecture: Architecture
    multiprocessors: int
    _kernels: dict[Variant, Any] = field(default_factory=dict, compare=False, repr=False)
    _streams: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def large_blocks(self) -> bool:
        return proven_on(self.index, self.architecture)

    def launch(
        self, variant: Variant, grid: tuple[int, int, int], threads: int, *arguments: Argument
    ) -> None:
        # CuPy loads a module, and sets a kernel's limits, on the device that its own runtime calls current
        with _cupy().cuda.Device(self.index), self._current_stream():
            kernel = self._kernels.get(variant) or self._load(variant)
            kernel(grid, (threads, 1, 1), c_values(arguments), shared_mem=variant.dynamic_shared)

    def _load(self, variant: Variant) -> Any:
        """The kernel as CuPy's RawKernel on the current device, compiled unless a cache has it."""
        cubin = compile_variant(variant, self.architecture.target)
        kernel = _cupy().RawModule(path=str(cubin.path)).get_function(variant.entry)
        if variant.dynamic_shared:
            kernel.max_dynamic_shared_size_bytes = variant.dynamic_shared
        self._kernels[variant] = kernel
        return kernel

    def _current_stream(self) -> Any:
        pointer = torch.cuda.current_stream(self.index).cuda_stream
        if pointer not in self._streams:
            with _cupy().cuda.Device(self.index):
                self._streams[pointer] = _cupy_stream(pointer)
        return self._streams[pointer]


def cuda_device(device: torch.device) -> CudaDevice:
    """The launcher of a GPU. Raises EnvironmentLacksError, with what is missing, where kernels can't run."""
    if device.type != "cuda":
        raise EnvironmentLacksError(f"the kernels need an NVIDIA GPU, not {device}", kind="no-gpu")
    if not torch.cuda.is_available():
        raise EnvironmentLacksError(
            "torch sees no NVIDIA GPU", hint="install a torch built for CUDA, and its driver", kind="no-gpu"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    return device_at(index)


def require_dtype(device: CudaDevice, dtype: torch.dtype) -> None:
    """Raises EnvironmentLacksError where a GPU has no arithmetic for a checkpoint's dtype."""
    if dtype == torch.bfloat16 and not device.architecture.bfloat16:
        raise EnvironmentLacksError(
            f"{torch.cuda.get_device_name(device.index)} has no bfloat16, which this checkpoint is stored in",
            hint="convert with dtype: float16, or use --backend reference",
            kind="no-bfloat16",
        )


@functools.cache
def device_at(index: int) -> CudaDevice:
    """The launcher of GPU `index`, checked once."""
    _cupy()
    facts = torch.cuda.get_device_properties(index)
    kind = architecture_of(facts.major, facts.minor)
    nvrtc.require_version(kind.least_nvrtc, kind.target)
    return CudaDevice(index, kind, facts.multi_processor_count)


# As the kernel's parameter has it: CuPy passes an int as 8 bytes, a numpy scalar as its own size. A table, because a
# launch converts a dozen arguments and should take a few microseconds.
_C_VALUES: dict[type, Callable[[Any], int | np.number]] = {
    int: functools.lru_cache(1024)(np.int32),
    float: np.float32,
    type(None): lambda null: 0,
}


def c_values(arguments: Iterable[Argument]) -> tuple[int | np.number, ...]:
    """What CuPy is given for a kernel's arguments: of a tensor its address."""
    return tuple([_C_VALUES.get(type(argument), Tensor.data_ptr)(argument) for argument in arguments])


@functools.cache
def _cupy() -> Any:
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        major = (torch.version.cuda or "13").split(".")[0]
        raise EnvironmentLacksError(
            f"CuPy, which launches the kernels, can't be imported: {error}",
            hint=f'pip install "svdq[cuda{major}]"',
            kind="no-cupy",
        ) from error
    return cupy


@dataclass(frozen=True, slots=True)
class _ForeignStream:
    """torch's stream in the CUDA stream protocol."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _cupy_stream(pointer: int) -> Any:
    stream = _cupy().cuda.Stream
    if pointer == 0:
        return stream.null
    if hasattr(stream, "from_external"):  # CuPy 14 and newer
        return stream.from_external(_ForeignStream(pointer))
    return _cupy().cuda.ExternalStream(pointer)
