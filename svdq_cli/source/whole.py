"""Whether a pipeline's components are all there, seen from names and headers: what a conversion copies without reading
it would only be missed when the result is loaded."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from svdq_cli.errors import InputError
from svdq_cli.source.classes import shapes_of
from svdq_cli.source.folders import header_of_files, pipeline_index, weight_files
from svdq_cli.source.variants import chosen_variant
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.library_facts import library_fact
from svdq_cli.system.quiet import quiet_loading
from svdq_cli.text import counted

_WEIGHTLESS = re.compile(
    r"Tokenizer|Processor|Scheduler|FeatureExtractor|Guid(er|ance)"
)  # in names of classes
_AUTOENCODER = re.compile(r"Autoencoder|VQModel")
# diffusers reads older files' names of attention too
_OLD_ATTENTION = re.compile(r"(?<=\.attentions\.\d\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_ALONE = "or convert the model alone: give its own folder, or write a single file with --format"


def require_whole(pipeline: Path, *, skip: Collection[str]) -> None:
    """InputError where a component of a pipeline, but for those to `skip`, is missing or damaged, or has its weights
    only as a pickle."""
    for name, value in pipeline_index(pipeline).items():
        if name in skip or name.startswith("_") or not isinstance(value, list):
            continue
        library, model_class = (*value, None, None)[:2]
        if not isinstance(library, str) or not isinstance(model_class, str):
            continue
        require_component(pipeline, name, model_class)


def _makes_itself(pipeline: Path, name: str) -> bool:
    """Whether diffusers reads a component from no folder, though the index names it: the pipeline's class has a default
    for it and makes it (LongCatAudioDiT its scheduler). `save_pretrained` writes none either."""
    import diffusers

    pipeline_class = getattr(diffusers, str(pipeline_index(pipeline).get("_class_name")), None)
    if not isinstance(pipeline_class, type) or not issubclass(pipeline_class, diffusers.DiffusionPipeline):
        return False
    parameter = inspect.signature(pipeline_class.__init__).parameters.get(name)
    has_default = parameter is not None and parameter.default is not inspect.Parameter.empty
    return has_default and name not in pipeline_class._optional_components


def require_component(pipeline: Path, name: str, model_class: str) -> None:
    """InputError where one component is missing or damaged."""
    folder = pipeline / name
    if not folder.is_dir():
        if _makes_itself(pipeline, name):
            return
        raise InputError(
            f"{pipeline}: component {name!r} is missing",
            hint=f"download the folder again ({name}/ should be next to the index), {_ALONE}",
            where=str(folder),
        )
    if _WEIGHTLESS.search(model_class):
        _require_settings(folder, name, model_class)
        return
    files = weight_files(folder)
    has_config = (folder / "config.json").is_file()
    if files and not has_config:
        raise InputError(
            f"{folder}: config.json is missing",
            hint="the download is incomplete; fetch the folder again",
            where=str(folder),
        )
    if has_config and not files and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: the weights of {name} are missing",
            hint=f"the download is incomplete; fetch the folder again, {_ALONE}",
            where=str(folder),
            kind="not-found",
        )
    stored = header_of_files(files).tensors
    if files and _AUTOENCODER.search(model_class):
        _require_tensors(folder, stored, read_json(folder / "config.json"))
    elif files:
        _require_encoder(folder, stored, read_json(folder / "config.json"), model_class)


def _require_settings(folder: Path, name: str, model_class: str) -> None:
    """InputError for a component without weights whose folder lacks what it is made from."""
    wanted = "scheduler_config.json" if model_class.endswith("Scheduler") else "*"
    if not any(folder.glob(wanted)):
        lacking = f"{wanted} is missing" if wanted != "*" else f"the files of {name} are missing"
        raise InputError(
            f"{folder}: {lacking}",
            hint=f"the download is incomplete; fetch the folder again, {_ALONE}",
            where=str(folder),
        )


def _require_encoder(
    folder: Path, stored: Collection[str], config: Mapping[str, object], model_class: str
) -> None:
    """InputError where a model of transformers lacks a tensor: it would be loaded with a random one, without a word."""
    if "quantization_config" in config:
        return
    names = hashlib.sha256("\0".join(sorted(stored)).encode()).hexdigest()
    about = (model_class, (folder / "config.json").read_text(encoding="utf-8"), names)
    missing = cast("list[str]", library_fact("encoder", about, lambda: _initialized(folder, model_class)))
    if missing:
        raise _lacking(folder, missing, model_class)


def _initialized(folder: Path, model_class: str) -> list[str]:
    """The tensors that transformers would initialize anew, for want of them in the files. Nothing is read but headers.
    Empty for a class that transformers does not know, and for what it can't load at all: loading that will say so."""
    import torch
    import transformers
    from transformers.utils import logging

    found = getattr(transformers, model_class, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return []
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with quiet_loading():
            _, info = cast("Any", found).from_pretrained(
                str(folder),
                device_map="meta",
                # another one would be the whole process' default while it loads: other threads read weights
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                variant=chosen_variant(folder),
            )
    except Exception:  # whatever transformers' loading raises
        return []
    finally:
        logging.set_verbosity(verbosity)
    return sorted(info["missing_keys"])


def _require_tensors(folder: Path, stored: Collection[str], config: Mapping[str, object]) -> None:
    """InputError where weights lack a tensor of their class: diffusers could not load them."""
    try:
        wanted = shapes_of(config, where=str(folder)).keys()
    except InputError:
        return  # a class of another release: whether it is whole can't be told here
    missing = sorted(wanted - {_OLD_ATTENTION.sub(_new_attention, name) for name in stored})
    if missing:
        raise _lacking(folder, missing, str(config.get("_class_name")))


def _lacking(folder: Path, missing: Sequence[str], model_class: str) -> InputError:
    return InputError(
        f"{folder}: the weights lack {counted(len(missing), 'tensor')} of {model_class}: "
        f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
        hint=f"download the folder again, {_ALONE}",
        where=str(folder),
        kind="damaged-file",
    )


def _new_attention(found: re.Match[str]) -> str:
    return {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[found[1]]
