"""What diffusers' own methods do on a converted model and its pipeline: what they say, or an error that names the way.

Methods are replaced on the objects, not in classes of svdq's own: `from_pipe` and the AutoPipelines hand a component to
another pipeline only if its type is the very class of that pipeline's signature. So what is replaced on the model holds
in every pipeline that has it. Replacements are partials of functions of a module, which are copied and pickled with
their object.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from svdq_cli.errors import UsageError
from svdq_cli.inference import lora_methods
from svdq_cli.inference.save import (
    LORAS,
    ORIGIN,
    Origin,
    copy_component,
    copy_papers,
    require_saveable,
    save_model,
)
from svdq_cli.storage.json_files import read_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SAVE = "save_pretrained"
_BY_KERNELS = "the layers are 4-bit, and svdq already quantizes an input once for all layers that read it"
_REFUSED: Mapping[str, tuple[str, str]] = {
    "fuse_qkv_projections": (f"projections are not fused: {_BY_KERNELS}", "leave the call out"),
    "fuse_projections": (f"projections are not fused: {_BY_KERNELS}", "leave the call out"),
    "dequantize": (
        "a 4-bit model can't be made 16-bit again",
        "load the model it was converted from",
    ),
    "add_adapter": (
        "peft's adapters can't be trained on svdq's layers",
        "train on the 16-bit model; svdq_cli.load_lora(pipe, FILE, NAME) loads the result",
    ),
    "save_lora_adapter": ("the LoRAs of a 4-bit model are in their files", "copy the files"),
    "fuse_lora": (
        "LoRAs already run inside the layers' 16-bit branches, at no extra cost",
        "give the scale to svdq_cli.set_adapters(pipe, {NAME: 0.8}); svdq lora CKPT --lora FILE:0.8 -o OUT folds it "
        "into a checkpoint",
    ),
    "enable_lora_hotswap": (
        "LoRAs of a 4-bit model are not swapped in place",
        "svdq_cli.load_lora and svdq_cli.set_adapters change them at any time",
    ),
}
_LORA_METHODS: Mapping[str, Callable[..., object]] = {
    "load_lora_adapter": lora_methods.load_into_model,
    "set_adapters": lora_methods.set_strengths,
    "set_adapter": lora_methods.set_strengths,
    "disable_lora": lora_methods.disable,
    "disable_adapters": lora_methods.disable,
    "enable_lora": lora_methods.enable,
    "enable_adapters": lora_methods.enable,
    "active_adapters": lora_methods.active,
    "delete_adapters": lora_methods.delete,
    "unload_lora": lora_methods.unload,
    "unfuse_lora": lora_methods.unfuse,
}
_SCALES = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")


def adopt_model(model: nn.Module, origin: Origin) -> None:
    """Replace the methods of a converted model, just loaded from `origin`, that its 16-bit class has for itself."""
    setattr(model, ORIGIN, origin)
    own: dict[str, Callable[..., object]] = {
        _SAVE: save_model,
        "push_to_hub": _push,
        "num_parameters": _parameters,
        "state_dict": _state_dict,
    }
    for name, function in {**own, **_LORA_METHODS}.items():
        setattr(model, name, partial(function, model))
    for module in model.modules():
        for name, words in _REFUSED.items():
            if hasattr(type(module), name):
                setattr(module, name, partial(_refuse, *words))
    model.register_forward_pre_hook(_require_no_scale, with_kwargs=True)


def adopt_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Replace those methods of a pipeline that do not work on a converted model, loaded from `folder`.

    Other components that are stored quantized are saved as they are stored, too.
    """
    for name, function in _PIPELINE_METHODS.items():
        setattr(pipe, name, partial(function, pipe))
    for name, part in pipe.components.items():
        config = folder / name / "config.json"
        if not isinstance(part, nn.Module) or hasattr(part, ORIGIN) or not config.is_file():
            continue
        if "quantization_config" in read_json(config):
            saving = partial(_save_as_stored, (folder / name).absolute())
            setattr(part, _SAVE, saving)


def _refuse(what: str, hint: str, *_: object, **__: object) -> NoReturn:
    raise UsageError(what, hint=hint)


def _save_as_stored(folder: Path, save_directory: str, **_: object) -> None:
    copy_component(folder, Path(save_directory))


def _save_pipeline(
    pipe: DiffusionPipeline,
    save_directory: str,
    safe_serialization: bool = True,
    variant: str | None = None,
    use_flashpack: bool = False,
    **others: Any,
) -> None:
    """The 4-bit model as it is stored, with its papers, and the other components as diffusers saves them."""
    for model in _models(pipe):
        origin = require_saveable(
            model, safe_serialization=safe_serialization, variant=variant, use_flashpack=use_flashpack
        )
        copy_papers(origin, Path(save_directory))
    type(pipe).save_pretrained(pipe, save_directory, **others)


def _push(owner: Any, *given: object, **options: object) -> object:
    """`push_to_hub`, which makes a repository before it saves: what can't be saved is refused first."""
    for model in [owner] if isinstance(owner, nn.Module) else _models(owner):
        require_saveable(model)
    own: Any = type(owner)
    return own.push_to_hub(owner, *given, **options)


def _models(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The pipeline's converted models, without what torch.compile puts around them."""
    found = [getattr(part, "_orig_mod", part) for part in pipe.components.values()]
    return [part for part in found if isinstance(part, nn.Module) and hasattr(part, ORIGIN)]


def _active_in(pipe: DiffusionPipeline) -> list[str]:
    return [name for model in _models(pipe) for name in lora_methods.active(model)]


def _loaded_in(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    parts = {name: getattr(part, "_orig_mod", part) for name, part in pipe.components.items()}
    return {name: found for name, part in parts.items() if (found := lora_methods.loaded(part))}


def _in_all(function: Callable[..., object], pipe: DiffusionPipeline, *given: Any, **options: Any) -> None:
    for model in _models(pipe):
        function(model, *given, **options)


def _set_in_all(pipe: DiffusionPipeline, adapter_names: Any, adapter_weights: Any = None) -> None:
    """As in diffusers, a name is set in those of the denoisers that have it."""
    lora_methods.set_strengths(pipe, adapter_names, adapter_weights)


def _parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Number of parameters of the 16-bit model, as diffusers counts those of quantized models. Nothing of a 4-bit model
    is trainable."""
    if only_trainable:
        return 0
    own: Any = type(model)
    origin: Origin = getattr(model, ORIGIN)
    if not exclude_embeddings:
        return origin.parameters
    embeddings = own.num_parameters(model) - own.num_parameters(model, exclude_embeddings=True)
    return origin.parameters - embeddings


class _RunningState(OrderedDict[str, Any]):
    """A state dict of layers as they run, which says why there are no 16-bit weights in it."""

    def __missing__(self, name: str) -> NoReturn:
        if name.endswith(".weight") and any(key.startswith(name.removesuffix("weight")) for key in self):
            raise UsageError(
                f"{name}: the layer is 4-bit and has no such weight",
                hint="LoRAs: svdq_cli.load_lora(pipe, FILE, NAME), then svdq_cli.set_adapters(pipe, {NAME: 1.0})",
                where=name,
            )
        raise KeyError(name)


def _state_dict(model: nn.Module, *given: Any, **options: Any) -> Mapping[str, Any]:
    found = type(model).state_dict(model, *given, **options)
    if type(found) is not OrderedDict:
        return found
    running = _RunningState(found)
    running._metadata = getattr(found, "_metadata", None)  # type: ignore[attr-defined]
    return running


def _require_no_scale(model: nn.Module, _: tuple[object, ...], given: Mapping[str, Any]) -> None:
    """diffusers' LoRA scale at the call, which peft's layers read and svdq's do not."""
    for name in _SCALES:
        said = given.get(name)
        if isinstance(said, dict) and said.get("scale", 1.0) != 1.0 and hasattr(model, LORAS):
            raise UsageError(
                f"{name}: a scale passed to the call does not reach the LoRAs of a 4-bit model",
                hint=f"svdq_cli.set_adapters(pipe, {{NAME: {said['scale']}}}) before the call",
            )


_PIPELINE_METHODS: Mapping[str, Callable[..., object]] = {
    _SAVE: _save_pipeline,
    "push_to_hub": _push,
    "load_lora_weights": lora_methods.load_into_pipeline,
    "set_adapters": _set_in_all,
    "get_active_adapters": _active_in,
    "get_list_adapters": _loaded_in,
    "disable_lora": partial(_in_all, lora_methods.disable),
    "enable_lora": partial(_in_all, lora_methods.enable),
    "delete_adapters": lora_methods.delete,
    "unload_lora_weights": partial(_in_all, lora_methods.unload),
    "fuse_lora": partial(_refuse, *_REFUSED["fuse_lora"]),
    "unfuse_lora": partial(_in_all, lora_methods.unfuse),
}
