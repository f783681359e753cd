"""What a launch hands to CuPy, and on which device, without a GPU."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from svdq_cli.gpu import launch
from svdq_cli.gpu.architectures import architecture
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launch import CudaDevice, c_values


def test_arguments_have_the_sizes_of_the_kernels_parameters():
    """CuPy copies as many bytes as a numpy scalar has, and 8 of an int."""
    x = torch.zeros(3)
    pointer, null, count, factor = c_values((x, None, 4608, 0.5))
    assert (pointer, null) == (x.data_ptr(), 0)
    assert (type(count), count) == (np.int32, 4608)
    assert (type(factor), factor) == (np.float32, 0.5)
    assert c_values((torch.nn.Parameter(x),)) == (x.data_ptr(),)


class FakeCupy:
    """CuPy as it treats devices: a module is loaded, and a kernel's limit set, on the one that is current."""

    def __init__(self) -> None:
        self.current = 0
        self.log: list[tuple[str, int]] = []
        self.cuda = SimpleNamespace(
            Device=self.device,
            Stream=SimpleNamespace(null=nullcontext(), from_external=lambda stream: nullcontext()),
        )

    @contextmanager
    def device(self, index: int):
        before, self.current = self.current, index
        yield
        self.current = before

    def RawModule(self, path: str):
        return SimpleNamespace(get_function=self.function)

    def function(self, name: str):
        self.log.append(("loaded", self.current))
        return FakeKernel(self)


class FakeKernel:
    def __init__(self, cupy: FakeCupy) -> None:
        self.cupy = cupy

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return 0

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        self.cupy.log.append(("limit set", self.cupy.current))

    def __call__(self, *arguments, **options) -> None:
        self.cupy.log.append(("launched", self.cupy.current))


def test_a_second_gpus_kernels_are_loaded_on_it_while_the_first_is_current(monkeypatch: pytest.MonkeyPatch):
    cupy = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    monkeypatch.setattr(launch, "_cupy", lambda: cupy)
    monkeypatch.setattr(launch, "compile_variant", lambda variant, target: SimpleNamespace(path=Path("x")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=7 + index))
    second = CudaDevice(1, architecture("sm_90a"), 132)
    for _ in range(2):
        second.launch(Variant("hopper_gemm", (("DYNAMIC_SHARED", 229504),)), (1, 1, 1), 384, 1)
    assert cupy.log == [("loaded", 1), ("limit set", 1), ("launched", 1), ("launched", 1)]
    assert cupy.current == 0
