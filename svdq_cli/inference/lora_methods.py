"""diffusers' LoRA methods by svdq's own: `load_lora_weights` and the like are `load_lora` and `set_adapters`.

As in diffusers, a LoRA that is loaded is switched on at once at full strength, and those before it are off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

import svdq_cli
from svdq_cli.errors import InputError, UsageError
from svdq_cli.inference.save import LORAS, ORIGIN
from svdq_cli.source import denoiser_order

_USUAL_NAME = "pytorch_lora_weights.safetensors"  # diffusers' own
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_INTO = "load_into_"  # before a component's name: diffusers' option for the second denoiser
_DISABLED = "svdq_disabled"  # attribute of a model: the strengths that `enable` brings back
_OWN_WAY = "svdq_cli.load_lora(pipe, FILE, NAME), then svdq_cli.set_adapters(pipe, {NAME: 1.0})"


def load_into_pipeline(
    pipe: Any,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    adapter_name: str | None = None,
    hotswap: bool = False,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> None:
    """`load_lora_weights`: a file, a folder with `weight_name`, or a repository of the Hub.

    Of several denoisers it is for the first, or for that of `load_into_transformer_2=True`. UsageError for tensors in
    memory and for `hotswap`; as `svdq_cli.load_lora` for the rest.
    """
    given = pretrained_model_name_or_path_or_dict
    if isinstance(given, Mapping):
        raise UsageError("a LoRA for a 4-bit model is read from its file, not from tensors", hint=_OWN_WAY)
    if hotswap:
        raise UsageError(
            "LoRAs of a 4-bit model are not swapped in place",
            hint=f"svdq_cli.unload_lora(pipe, NAME), then {_OWN_WAY}",
        )
    hub = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    file = _lora_file(str(given), weight_name, subfolder, hub)
    name = adapter_name or _new_name(pipe)
    models = _models_of(pipe)
    before = [model for model in models.values() if name in loaded(model)]
    said = [
        option.removeprefix(_INTO) for option, value in options.items() if option.startswith(_INTO) and value
    ]
    component = said[0] if said else next(iter(models)) if len(models) > 1 else None
    svdq_cli.load_lora(pipe, file, name, component=component)
    for model in models.values():
        if name in loaded(model) and model not in before:
            svdq_cli.set_adapters(cast("Any", model), {name: 1.0})


def load_into_model(model: nn.Module, given: Any, **options: Any) -> None:
    """`load_lora_adapter` of the model alone; a pipeline that svdq did not make itself comes here with tensors."""
    options.pop("prefix", None)
    load_into_pipeline(model, given, **options)


def set_strengths(
    owner: object,
    adapter_names: str | Sequence[str],
    weights: float | Sequence[float | None] | None = None,
) -> None:
    """`set_adapters` of a pipeline or a model: strengths of the named LoRAs, 1.0 where none is given; the others are
    off.

    UsageError for strengths by block.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    found = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
    if len(found) != len(names):
        raise UsageError(f"{len(names)} LoRAs, but {len(found)} strengths", hint="give one strength for each")
    if any(isinstance(weight, Mapping) for weight in found):
        raise UsageError(
            "a LoRA has one strength in all of a 4-bit model's blocks",
            hint="svdq_cli.set_adapters(pipe, {NAME: 0.8})",
        )
    strengths = {name: 1.0 if w is None else float(w) for name, w in zip(names, found, strict=True)}
    svdq_cli.set_adapters(cast("Any", owner), strengths)


def active(model: nn.Module) -> list[str]:
    """The LoRAs that act."""
    return [name for name, strength in _strengths(model).items() if strength != 0]


def disable(model: nn.Module) -> None:
    """All LoRAs off, until `enable`."""
    if acting := _strengths(model):
        svdq_cli.set_adapters(cast("Any", model), {})
        setattr(model, _DISABLED, acting)


def enable(model: nn.Module) -> None:
    """The strengths that `disable` found."""
    if before := getattr(model, _DISABLED, None):
        svdq_cli.set_adapters(cast("Any", model), before)
        delattr(model, _DISABLED)


def delete(owner: object, adapter_names: str | Sequence[str]) -> None:
    """Forget LoRAs of a pipeline or a model. UsageError for a name that is not loaded."""
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        svdq_cli.unload_lora(cast("Any", owner), name)


def unload(model: nn.Module) -> None:
    """Forget all LoRAs."""
    delete(model, loaded(model))


def unfuse(model: nn.Module, *_: object, **__: object) -> None:
    """Nothing: no LoRA of a 4-bit model is ever fused."""


def loaded(model: object) -> list[str]:
    """The LoRAs that are loaded, whether they act or not."""
    return list(getattr(getattr(model, LORAS, None), "loras", {}))


def _strengths(model: nn.Module) -> dict[str, float]:
    return dict(getattr(getattr(model, LORAS, None), "strengths", {}))


def _models_of(pipe: Any) -> dict[str, nn.Module]:
    """The converted denoisers of a pipeline in their order, or a model itself."""
    if isinstance(pipe, nn.Module):
        return {"transformer": pipe}
    parts = {name: getattr(part, "_orig_mod", part) for name, part in pipe.components.items()}
    names = sorted((name for name in parts if hasattr(parts[name], ORIGIN)), key=denoiser_order)
    return {name: parts[name] for name in names}


def _new_name(pipe: Any) -> str:
    """A new name for a LoRA without one, as diffusers makes it."""
    parts = [pipe] if isinstance(pipe, nn.Module) else pipe.components.values()
    taken = {name for part in parts for name in loaded(getattr(part, "_orig_mod", part))}
    return next(f"default_{n}" for n in range(len(taken) + 1) if f"default_{n}" not in taken)


def _lora_file(given: str, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        return _from_hub(given, weight_name or _USUAL_NAME, subfolder, hub)
    folder = path / (subfolder or "")
    if weight_name is not None:
        return folder / weight_name
    if (folder / "adapter_config.json").is_file():  # peft's own: `load_lora` reads the folder
        return folder
    files = sorted(folder.glob("*.safetensors"))
    usual = [file for file in files if file.name == _USUAL_NAME]
    if len(usual or files) != 1:
        raise InputError(
            f"{folder}: {len(files)} LoRA files",
            hint="name one of them: weight_name=FILE",
            where=str(folder),
        )
    return (usual or files)[0]


def _from_hub(repository: str, file: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, subfolder=subfolder, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repository}: no such file or folder, and the Hub has no {file} for it: {str(error).splitlines()[0]}",
            hint="give the path of a LoRA file, or a Hub repository and weight_name=FILE",
            where=repository,
            kind="not-found",
        ) from error
