"""The border with diffusers: a 16-bit pipeline loaded from its folder."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from svdq_cli.errors import EnvironmentLacksError, InputError, OutOfResourcesError, first_line
from svdq_cli.pipelines.modular import load_modular
from svdq_cli.source import pipeline_index
from svdq_cli.source.modular_index import libraries_of
from svdq_cli.source.variants import chosen_variant
from svdq_cli.source.whole import require_component
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import INDEXES, MODULAR_INDEX, index_file, is_modular
from svdq_cli.system.quiet import quiet_loading

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

_LIBRARIES = ("diffusers", "transformers")  # anything else in model_index.json would run code from the folder
# Autoencoders that diffusers has no decoding for but in tiles, which it leaves off all the same
_IN_TILES = ("AutoencoderKLAllegro",)


def load_source_pipeline(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = "cpu",
    components: Mapping[str, object] | None = None,
) -> DiffusionPipeline:
    """A pipeline folder on a device (None: every part where it is), in eval mode, with its progress bars off.

    `components` are used as they are instead of being read from the folder. Reads safetensors only, never the
    network, and runs no code from the folder.
    Raises InputError where a component is missing, damaged or unknown; OutOfResourcesError if the device is too small.
    """
    pipeline_class = _checked_class(folder, given=(components or {}).keys())
    _require_packages(folder, given=(components or {}).keys())
    try:
        with quiet_loading():
            pipe = _loaded(pipeline_class, folder, dtype, components or {})
        _as_asked(pipe, dtype)
        if device is not None:
            pipe.to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfResourcesError(
            f"{folder}: the pipeline does not fit on {device}",
            hint="close other programs, or use --device cpu",
            where=str(folder),
        ) from error
    except Exception as error:
        if (package := _lacking(error)) is not None:
            raise EnvironmentLacksError(
                f"{folder}: diffusers can't load this pipeline without the package {package}",
                hint=f"pip install {package}, of the release that belongs to torch {torch.__version__}"
                if package == "torchvision"
                else f"pip install {package}",
                where=package,
            ) from error
        # from_pretrained raises whatever its parts raise: OSError, ValueError, KeyError, SafetensorError, ...
        raise InputError(
            f"{folder}: diffusers can't load this pipeline: {first_line(error)}",
            hint="download the folder again, and check that this diffusers version knows the model",
            where=str(folder),
        ) from error
    pipe.set_progress_bar_config(disable=True)
    autoencoder = getattr(pipe, "vae", None)
    if autoencoder is not None and type(autoencoder).__name__ in _IN_TILES:
        autoencoder.enable_tiling()
    return pipe


def _lacking(error: Exception) -> str | None:
    """The package that a pipeline's part wants and that is not installed; None for any other error."""
    if isinstance(error, ImportError):
        said = re.search(r"requires the (\w+) library but it was not found", str(error))
        return said[1].lower() if said else error.name if isinstance(error, ModuleNotFoundError) else None
    # diffusers defines what reads images (OmniGen's processor) only where torchvision is
    wanted = isinstance(error, NameError) and importlib.util.find_spec("torchvision") is None
    return "torchvision" if wanted else None


def _as_asked(pipe: DiffusionPipeline, dtype: torch.dtype) -> None:
    """What transformers 5 leaves in the file's dtype next to bitsandbytes' layers (weights of norms, embeddings) in
    `dtype`, as it leaves it elsewhere."""
    for part in pipe.components.values():
        if not getattr(part, "is_loaded_in_4bit", False):
            continue
        for parameter in cast("torch.nn.Module", part).parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                parameter.data = parameter.data.to(dtype)


def _require_packages(folder: Path, *, given: Collection[str]) -> None:
    """EnvironmentLacksError where a component is stored in 4 bits and the package that reads it is missing."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    for name in pipeline_index(folder):
        file = folder / name / "config.json"
        if name in given or not file.is_file():
            continue
        section = read_json(file).get("quantization_config")
        if isinstance(section, dict) and section.get("quant_method") == "bitsandbytes":
            raise EnvironmentLacksError(
                f"{folder / name}: its 4-bit weights need the package bitsandbytes",
                hint='pip install "svdq[encoders]"',
                where="bitsandbytes",
            )


def _loaded(
    pipeline_class: Any, folder: Path, dtype: torch.dtype, components: Mapping[str, object]
) -> DiffusionPipeline:
    if is_modular(folder):
        return load_modular(pipeline_class, folder, dtype=dtype, components=components)
    # DiffusionPipeline.from_pretrained loads components that are optional arguments of the class (Wan's transformers)
    # from the folder, whatever it is given for them
    return pipeline_class.from_pretrained(
        str(folder),
        torch_dtype=dtype,  # deprecated, but diffusers before `dtype` would ignore that and load float32
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        variant=_variant(folder, given=components.keys()),
        **components,
    )


def _variant(folder: Path, *, given: Collection[str]) -> str | None:
    """The variant that from_pretrained has to be told of; it takes plain weights where a component has no such one."""
    parts = [folder / name for name in pipeline_index(folder) if name not in given]
    found = [chosen_variant(part) for part in parts if part.is_dir()]
    return next((variant for variant in found if variant is not None), None)


def _checked_class(folder: Path, *, given: Collection[str]) -> type[DiffusionPipeline]:
    """The class of the pipeline in a folder. Refuses early, and with a better message than diffusers', what can't be a
    pipeline folder. Components that are `given` need not be there."""
    index = index_file(folder)
    if index is None:
        raise InputError(
            f"{folder}: not a diffusers pipeline folder (it has no {' and no '.join(INDEXES)})",
            hint="give a folder that save_pretrained wrote, or a complete download",
            where=str(folder),
        )
    for name, value in read_json(index).items():
        for library in libraries_of(value):
            _require_library(folder, name, library)
    parts = pipeline_index(folder)
    pipeline_class = _named_class(index, parts.get("_class_name"))
    for name, value in parts.items():
        # a component is [library, class]; [null, null] is one that the pipeline does without, numbers are its settings
        if name.startswith("_") or name in given:
            continue
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
            _require_library(folder, name, value[0])
            require_component(folder, name, str(value[1]))
    return pipeline_class


def _named_class(index: Path, name: object) -> type[DiffusionPipeline]:
    import diffusers

    base: Any = diffusers.ModularPipeline if index.name == MODULAR_INDEX else diffusers.DiffusionPipeline
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise InputError(
            f"{index}: _class_name {name!r} is not a pipeline of diffusers {diffusers.__version__}",
            hint="upgrade diffusers; svdq runs no pipeline code from the folder itself",
            where=str(index),
        )
    return cast("type[DiffusionPipeline]", found)


def _require_library(folder: Path, name: str, library: str) -> None:
    """InputError for a component whose class would be imported from anywhere else than the libraries."""
    import diffusers.pipelines

    if library not in _LIBRARIES and not hasattr(diffusers.pipelines, library):
        raise InputError(
            f"{folder}: component {name!r} comes from {library!r}; svdq runs no code from the folder",
            hint=f"use a pipeline whose parts come from {' and '.join(_LIBRARIES)}",
            where=str(folder / name),
        )
