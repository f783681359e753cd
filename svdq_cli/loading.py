"""Checkpoints as diffusers pipelines that run here: `svdq_cli.load_pipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from svdq_cli.calibrate.pipelines import load_source_pipeline
from svdq_cli.checkpoint import Checkpoint, open_checkpoint
from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.inventory import model_class
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.replace import replace_linears
from svdq_cli.source import Source, read_tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes the 4-bit layers of a loaded pipeline, and why this one."""

    name: Literal["reference"]
    reason: str


def choose_backend(wanted: str, device: torch.device) -> Backend:
    """Raises EnvironmentLacksError for a backend that this version or machine does not have."""
    if wanted not in ("auto", "reference"):
        raise EnvironmentLacksError(
            f"backend {wanted!r} is not in this version",
            hint="use --backend reference: plain torch, the arithmetic of the 4-bit runtimes, not their speed",
        )
    return Backend("reference", f"plain torch on {device}: this version ships no CUDA kernels")


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the unquantized parts compute in: bfloat16 on a GPU; float32 on a CPU, where 16-bit arithmetic is emulated
    and slow. Converted layers round to 16 bit inside either way, as the runtimes do."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> DiffusionPipeline:
    """A diffusers pipeline that computes what the 4-bit runtimes compute.

    `path` is a folder that `svdq convert` wrote. `device` defaults to the GPU where there is one. The choice of
    backend stands in `pipe.svdq_backend`. Raises InputError for a damaged or foreign folder.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend_facts = choose_backend(backend, chosen)
    checkpoint = open_checkpoint(Path(path))
    if checkpoint.source.pipeline is None:
        raise InputError(
            f"{path}: only one component is here, not a pipeline",
            hint="convert a whole pipeline folder, or pass this component to your own pipeline",
            where=str(path),
        )
    dtype = dtype or compute_dtype(chosen)
    model = load_model(checkpoint, dtype=dtype)
    pipe = load_source_pipeline(
        checkpoint.source.pipeline,
        dtype=dtype,
        device=chosen,
        components={checkpoint.source.component: model},
    )
    pipe.svdq_backend = backend_facts  # type: ignore[attr-defined]
    return pipe


def load_16bit_pipeline(source: Source, *, class_name: str, device: torch.device) -> DiffusionPipeline:
    """The pipeline of a 16-bit source that has one (`source.pipeline`), on a device.

    Where diffusers can't read the model itself (a single file, merged adapters), it is built from the source's tensors.
    """
    assert source.pipeline is not None
    dtype = compute_dtype(device)
    built = {} if source.is_saved_pipeline else {source.component: _built(source, class_name, dtype)}
    return load_source_pipeline(source.pipeline, dtype=dtype, device=device, components=built)


def _built(source: Source, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The 16-bit component on the CPU. The plan has checked that no tensor is missing."""
    model = _unfilled(source, class_name)
    state = {name: read_tensor(source, name).to(dtype) for name in source.tensors}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _unfilled(source: Source, class_name: str) -> nn.Module:
    """The component with its buffers but without memory for its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return model_class(class_name, where=str(source.path)).from_config(
            {key: value for key, value in source.config.items() if key != "quantization_config"}
        )


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> nn.Module:
    """The quantized component on the CPU, its 4-bit layers in the runtime's modules."""
    model = _unfilled(checkpoint.source, checkpoint.model_class)
    quantized = {plan.name: quantized_linear(checkpoint.solution(plan)) for plan in checkpoint.layers}
    replace_linears(model, quantized)
    kept = {name: checkpoint.kept_tensor(name).to(dtype) for name in checkpoint.kept_names()}
    model.load_state_dict(kept, strict=False, assign=True)
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise InputError(
            f"{checkpoint.source.path}: {empty[0]} is missing from the checkpoint",
            hint="the download is incomplete; svdq check lists what is missing",
            where=empty[0],
        )
    return model.eval().requires_grad_(False)
