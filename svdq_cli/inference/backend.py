"""What computes the 4-bit layers: asked for by name, or chosen by the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from svdq_cli.cpu.engine import engine, lack_of_engine
from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.experimental.hopper.choice import HopperChoice, choose_hopper_mode, measured_modes
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.launch import cuda_device, require_dtype
from svdq_cli.runtime.large_blocks import prove_large_blocks


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes the 4-bit layers of a loaded pipeline, and why this one."""

    name: Literal["kernels", "cpu", "reference"]
    reason: str
    mode: HopperMode | None = None  # which of Hopper's own kernels run int4 layers; None: the portable ones

    @property
    def label(self) -> str:
        """What results depend on: backends of one label compute the same numbers."""
        return self.name if self.mode is None else f"{self.name}:{self.mode.label}"

    @property
    def sentence(self) -> str:
        """As reports have it."""
        return f"{self.name}: {self.reason}"


HOPPER_BACKENDS = {f"kernels:{mode.label}": mode for mode in HopperMode}
BACKENDS = ("auto", "kernels", *HOPPER_BACKENDS, "cpu", "reference")


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """`auto` takes the CUDA kernels on a GPU, our engine on a CPU, and else plain torch; it says which and why. `dtype`
    is the checkpoint's.

    On Hopper `kernels:MODE` asks for one of its own modes; without one the measured default is taken. Raises
    EnvironmentLacksError for kernels, or the engine, on a machine that can't run them, UsageError for an unknown name.
    """
    if wanted not in BACKENDS:
        raise UsageError(f"unknown backend {wanted!r}", hint=f"use {', '.join(BACKENDS)}")
    if wanted == "reference":
        return Backend("reference", f"plain torch on {device}, as asked")
    if wanted == "cpu" or (wanted == "auto" and device.type == "cpu"):
        return _on_cpu(wanted, device)
    try:
        gpu = cuda_device(device)
        require_dtype(gpu, dtype)
    except EnvironmentLacksError as lack:
        if wanted.startswith("kernels"):
            raise
        return Backend("reference", f"plain torch on {device}: {lack.message}")
    return _on_kernels(gpu.architecture, HOPPER_BACKENDS.get(wanted))


def with_large_blocks(backend: Backend, device: torch.device) -> Backend:
    """The backend after a card's first use: the trial of the GEMM's large blocks, in seconds, once for a card and a
    version of the kernels. A card on which they fail keeps the blocks before; the reason says so."""
    if backend.name != "kernels" or device.type != "cuda":
        return backend
    found = prove_large_blocks(cuda_device(device))
    if found is None or found.sound:
        return backend
    return replace(backend, reason=f"{backend.reason}, without large blocks ({found.reason})")


def _on_cpu(wanted: str, device: torch.device) -> Backend:
    if device.type != "cpu":
        raise EnvironmentLacksError(
            f"the CPU engine can't run on {device}",
            hint="use --device cpu, or --backend auto",
            kind="not-a-cpu",
        )
    if (lack := lack_of_engine()) is None:
        return Backend("cpu", f"svdq's CPU engine, {engine().isa.name}")
    if wanted == "cpu":
        raise lack
    return Backend("reference", f"plain torch on {device}: {lack.message}; {lack.hint}")


def _on_kernels(kind: Architecture, asked: HopperMode | None) -> Backend:
    kernels = f"CUDA kernels for {kind.target}"
    if kind.hopper_modes:
        choice = choose_hopper_mode(measured_modes())
        if asked is not None:
            choice = HopperChoice(asked, f"int4 in mode {asked.label}, as asked: {asked.exactness}")
        return Backend("kernels", f"{kernels}; {choice.reason}", choice.mode)
    if asked is not None:
        raise EnvironmentLacksError(
            f"mode {asked.label} needs a Hopper GPU; this one runs kernels for {kind.target}",
            hint="use --backend kernels",
            kind="no-kernel-for-gpu",
        )
    return Backend("kernels", kernels)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What calibration and evaluation compute in, the unquantized parts of a converted model among it: bfloat16 on a
    GPU; float32 on a CPU, so that figures say what quantizing costs, and the same on every processor. Converted layers
    round to 16 bits inside either way, as the runtimes do."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def running_dtype(backend: Backend, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What a converted pipeline that just runs computes in, `stored` being its checkpoint's dtype.

    That of `compute_dtype`, but for processors that multiply bfloat16 numbers themselves and are several times as fast
    in it.
    """
    native = backend.name == "cpu" and engine().has_attention and stored == torch.bfloat16
    return torch.bfloat16 if native else compute_dtype(device)
