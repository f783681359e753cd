"""Checkpoints as diffusers pipelines that run here: `svdq_cli.load_pipeline`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from svdq_cli.checkpoint.reader import Checkpoint, component_in, open_checkpoint
from svdq_cli.errors import InputError, OutOfResourcesError
from svdq_cli.experimental.hopper.linear import hopper_linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.inference.backend import (
    Backend,
    choose_backend,
    compute_dtype,
    running_dtype,
    with_large_blocks,
)
from svdq_cli.inference.diffusers_methods import adopt_model, adopt_pipeline
from svdq_cli.inference.save import MEANS, Origin
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.records import Int4, LayerSolution, W4A4Solution
from svdq_cli.runtime.cpu_attention import use_engine_attention
from svdq_cli.runtime.cpu_fused import cpu_linear
from svdq_cli.runtime.cpu_operands import cpu_unsupported_reason
from svdq_cli.runtime.fused import fused_linear
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.operands import unsupported_reason
from svdq_cli.runtime.replace import fuse_feed_forwards, replace_linears, share_quantizers
from svdq_cli.sampling import sampling_of, with_call_defaults
from svdq_cli.sampling.schedulers import scheduler_with
from svdq_cli.source import (
    Source,
    by_component,
    denoisers_of,
    has_settings,
    read_tensor,
    take_experts_apart,
)
from svdq_cli.source.classes import model_class
from svdq_cli.system.offload import WeightBudget, fill, fill_beside, weights_bytes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    base: str | Path | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline that computes what the 4-bit runtimes compute.

    `path` is a folder or a single file that `svdq convert` wrote; a single file needs the other components of its
    pipeline from `base`, a diffusers pipeline folder. `device` defaults to the GPU where there is one, `dtype` (of what
    is not 4-bit) to bfloat16 where the device multiplies such numbers itself, else to float32. The choice of backend is
    stored in `pipe.svdq_backend`. A call without arguments samples as the model wants it: image size, steps and
    guidance are its own. Raises InputError for a damaged or foreign checkpoint.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = open_checkpoint(Path(path), base=Path(base) if base is not None else None)
    backend_facts = with_large_blocks(choose_backend(backend, chosen, checkpoint.dtype), chosen)
    pipeline = Path(base) if base is not None else checkpoint.source.pipeline
    if pipeline is None:
        raise InputError(
            f"{path}: only one component, not a pipeline",
            hint="name the pipeline that has the other components (base=FOLDER, --base FOLDER)",
            where=str(path),
        )
    dtype = dtype or running_dtype(backend_facts, chosen, checkpoint.dtype)
    models: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for denoiser in checkpoint.denoisers:
        component = component_in(pipeline, denoiser)
        models[component], unsupported_reasons = load_model(denoiser, dtype=dtype, backend=backend_facts)
        refused |= unsupported_reasons
        adopt_model(models[component], Origin.of(denoiser, Path(path)))
    components = {**models, **_own_scheduler(checkpoint.source, pipeline)}
    pipe = load_source_pipeline(pipeline, dtype=dtype, device=chosen, components=components)
    adopt_pipeline(pipe, pipeline)
    with_call_defaults(pipe, sampling_of(replace(checkpoint.source, pipeline=pipeline)))
    pipe.svdq_backend = _with_refused(_with_dtype(backend_facts, dtype), refused)  # type: ignore[attr-defined]
    return pipe


def load_16bit_pipeline(source: Source, *, class_name: str, device: torch.device) -> DiffusionPipeline:
    """The pipeline of a 16-bit source that has one (`source.pipeline`), whole on a device."""
    pipe = load_without_denoiser(source, class_name=class_name, device=device)
    fill_denoiser(pipe, source, class_name=class_name, device=device)
    return pipe


def load_without_denoiser(source: Source, *, class_name: str, device: torch.device) -> DiffusionPipeline:
    """The source's pipeline with empty denoisers, which know their config and shapes but take no memory.

    A text encoder that the GPU has no room for stays in host memory, and its layers are brought there as they run.
    """
    assert source.pipeline is not None
    dtype = compute_dtype(device)
    empty = {
        denoiser.component: _empty_denoiser(denoiser, class_name, dtype) for denoiser in denoisers_of(source)
    }
    components = {**empty, **_own_scheduler(source, source.pipeline)}
    pipe = load_source_pipeline(source.pipeline, dtype=dtype, device=None, components=components)
    for name, entries in source.companions.items():
        _replace_weights(getattr(pipe, name), {key: entry.read() for key, entry in entries.items()}, name)
    parts = [part for _, part in _other_parts(pipe, source)]
    crowded = [part for part in parts if not _moved(part, device)]
    for part in crowded:
        cpu_offload(part, execution_device=device)
    if crowded:
        _tell_device([*empty.values(), *(part for part in parts if part not in crowded)], device)
    return pipe


def _own_scheduler(source: Source, pipeline: Path) -> dict[str, object]:
    """The scheduler that a model needs, where it needs another than its pipeline has."""
    if has_settings(pipeline, source.scheduler):
        return {}
    return {"scheduler": scheduler_with(pipeline, source.scheduler)}


def load_beside(
    source: Source, blocks: Collection[str], *, class_name: str, device: torch.device
) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    """A 16-bit denoiser with the weights outside `blocks` (paths), on the device, and all its
    weights by name, each read when it is asked for. Raises OutOfResourcesError if it does not fit."""
    model = _empty_denoiser(source, class_name, compute_dtype(device))
    weights = _Weights(source, {name: tensor.dtype for name, tensor in model.state_dict().items()})
    try:
        fill_beside(model, blocks, weights, device=device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _does_not_fit(source.path, device) from error
    return model, weights


def fill_denoiser(
    pipe: DiffusionPipeline,
    source: Source,
    *,
    class_name: str,
    device: torch.device,
    room: WeightBudget | None = None,
) -> None:
    """Puts the denoisers with their weights into a pipeline of `load_without_denoiser`: all of them on the device or,
    with less `room` than that takes, block by block when they run. Raises OutOfResourcesError if they do not fit."""
    models: dict[str, nn.Module] = {}
    for denoiser in denoisers_of(source):
        models[denoiser.component] = _empty_denoiser(denoiser, class_name, compute_dtype(device))
        setattr(pipe, denoiser.component, models[denoiser.component])  # the one before it makes room
    total = sum(map(weights_bytes, models.values()))
    for denoiser in denoisers_of(source):
        model = models[denoiser.component]
        weights = _Weights(denoiser, {name: tensor.dtype for name, tensor in model.state_dict().items()})
        own = weights_bytes(model)
        share = room.share(own / total) if room and len(models) > 1 else room
        try:
            fill(model, weights, device=device, room=share or WeightBudget(own, 0))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _does_not_fit(source.path, device) from error
    if any(parameter.is_meta for model in models.values() for parameter in model.parameters()):
        _tell_device((part for _, part in _other_parts(pipe, source)), device)


def _other_parts(pipe: DiffusionPipeline, source: Source) -> list[tuple[str, nn.Module]]:
    parts = pipe.components.items()
    return [
        (name, part) for name, part in parts if isinstance(part, nn.Module) and name not in source.components
    ]


def _empty_denoiser(source: Source, class_name: str, dtype: torch.dtype) -> nn.Module:
    """`class_name`: where the config does not say it."""
    model = _unfilled(source, str(source.config.get("_class_name") or class_name))
    _set_dtype(model, dtype)
    return model.eval().requires_grad_(False)


class _Weights(Mapping[str, torch.Tensor]):
    """A source's tensors in the dtypes of a model, each read when it is asked for."""

    def __init__(self, source: Source, dtypes: Mapping[str, torch.dtype]) -> None:
        self._source, self._dtypes = source, dtypes

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._source, name).to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)


def _moved(part: nn.Module, device: torch.device) -> bool:
    """Whether a component fits on the device, where it then is; it stays in host memory otherwise."""
    try:
        part.to(device)
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    # Only here are the tensors gone that were moved: the exception held its frames.
    part.to("cpu")
    torch.cuda.empty_cache()
    return False


def _tell_device(parts: Iterable[nn.Module], device: torch.device) -> None:
    """diffusers asks its parts where to compute, and an offloaded one has no answer but its hooks."""
    for part in parts:
        add_hook_to_module(part, AlignDevicesHook(device, io_same_device=True))


def _does_not_fit(where: Path, device: torch.device) -> OutOfResourcesError:
    return OutOfResourcesError(
        f"{where}: does not fit on {device}",
        hint="close other programs, or use --device cpu",
        where=str(where),
    )


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype of an empty model's tensors; buffers that no file holds (position tables) stay as the class made
    them."""
    wanted = _dtypes(model, dtype)
    stored = model.state_dict()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            given = parameter.to(wanted(f"{path}.{name}"))
            module.register_parameter(name, nn.Parameter(given, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if f"{path}.{name}".lstrip(".") in stored and buffer.is_floating_point():
                module.register_buffer(name, buffer.to(wanted(f"{path}.{name}")))


def _dtypes(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype of a tensor by its name, where the model computes in `dtype`: some classes keep a few modules in
    float32, as diffusers' loading does."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return lambda name: torch.float32 if exact & set(name.split(".")) else dtype


def _replace_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], component: str) -> None:
    """Other weights into a loaded component. transformers 5.6 dropped CLIPTextModel's outer name, which files keep."""
    own = model.state_dict().keys()

    def loaded_name(name: str) -> str:
        spellings = (name, name.removeprefix("text_model."), f"text_model.{name}")
        return next((spelling for spelling in spellings if spelling in own), name)

    state = {loaded_name(name): tensor for name, tensor in weights.items()}
    if homeless := model.load_state_dict(state, strict=False).unexpected_keys:
        raise InputError(
            f"{component}: this version of transformers or diffusers does not know {homeless[0]}",
            hint="upgrade diffusers and transformers, or remove the other components from the file",
            where=homeless[0],
        )


def _unfilled(source: Source, class_name: str) -> nn.Module:
    """The component with its buffers but without memory for its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = model_class(class_name, where=str(source.path)).from_config(
            {key: value for key, value in source.config.items() if key != "quantization_config"}
        )
    take_experts_apart(model)
    return model


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, backend: Backend
) -> tuple[nn.Module, Mapping[str, str]]:
    """The quantized component on the CPU, its 4-bit layers in the backend's modules.

    Also returns the layers that the backend's kernels can't run, by name: what runs them, and why.
    """
    model = _unfilled(checkpoint.source, checkpoint.model_class)
    quantized: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for plan in checkpoint.layers:
        solution = checkpoint.solution(plan)
        unsigned_from = checkpoint.unsigned_from(plan)
        layer, reason = _layer(solution, backend, unsigned_from)
        quantized[plan.name] = layer
        if reason is not None:
            refused[plan.name] = reason
    replace_linears(model, quantized)
    if backend.name != "reference":
        fuse_feed_forwards(model)
        share_quantizers(model)
    if backend.name == "cpu":
        use_engine_attention(model)
    wanted = _dtypes(model, dtype)
    kept = {name: checkpoint.kept_tensor(name).to(wanted(name)) for name in checkpoint.kept_names()}
    model.load_state_dict(kept, strict=False, assign=True)
    if empty := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise InputError(
            f"{checkpoint.source.path}: {empty[0]} is missing from the checkpoint",
            hint="the download is incomplete; svdq check lists what is missing",
            where=empty[0],
        )
    if means := checkpoint.means():
        setattr(model, MEANS, means)
    return model.eval().requires_grad_(False), refused


def replace_layers(
    pipe: DiffusionPipeline, components: Sequence[str], layers: Mapping[str, nn.Module]
) -> None:
    """Set layers of a pipeline's denoisers by their joint names, as `replace_linears` sets those of one."""
    for component, own in by_component(components, layers).items():
        replace_linears(getattr(pipe, component), own)


def _layer(
    solution: LayerSolution, backend: Backend, unsigned_from: int | None
) -> tuple[nn.Module, str | None]:
    """The module that runs a solution, and what else runs it than the backend's own choice, and why."""
    match backend.name:
        case "reference":
            reason = None
        case "cpu":
            if (reason := cpu_unsupported_reason(solution)) is None:
                return cpu_linear(solution, unsigned_from=unsigned_from), None
        case "kernels":
            if (reason := unsupported_reason(solution)) is None:
                mode = backend.mode if _wants_hopper(solution, backend.mode) else None
                return _kernel_linear(solution, mode, unsigned_from), None
    plain = quantized_linear(solution, unsigned_from=unsigned_from)
    return plain, None if reason is None else f"in plain torch: {reason}"


def _kernel_linear(solution: LayerSolution, mode: HopperMode | None, unsigned_from: int | None) -> nn.Module:
    """A linear layer on the CUDA kernels; on Hopper's own if `mode` is one of theirs."""
    if mode is not None and isinstance(solution, W4A4Solution):
        return hopper_linear(solution, mode, unsigned_from=unsigned_from)
    return fused_linear(solution, unsigned_from=unsigned_from)


def _wants_hopper(solution: LayerSolution, mode: HopperMode | None) -> bool:
    return (
        mode is not None and isinstance(solution, W4A4Solution) and isinstance(solution.plan.precision, Int4)
    )


def _with_dtype(backend: Backend, dtype: torch.dtype) -> Backend:
    """What the rest computes in is said on a CPU, where it depends on the processor."""
    if backend.name != "cpu":
        return backend
    return replace(
        backend, reason=f"{backend.reason}; what is not 4-bit in {str(dtype).removeprefix('torch.')}"
    )


def _with_refused(backend: Backend, refused: Mapping[str, str]) -> Backend:
    if not refused:
        return backend
    name, reason = next(iter(refused.items()))
    others = f" and {len(refused) - 1} more layers" if len(refused) > 1 else ""
    return replace(backend, reason=f"{backend.reason}; but {name}{others} {reason}")
