"""Pipelines of Modular Diffusers: blocks that share named values, loaded and called as other pipelines are.

A modular pipeline takes whatever its blocks read, and its call names none of it. What is loaded here has a call whose
signature names them, so that all who ask a pipeline what it takes get an answer; it is otherwise the library's own.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from svdq_cli.errors import InputError
from svdq_cli.pipelines.generated import OUTPUTS, PICTURES, answers_in
from svdq_cli.source import pipeline_index
from svdq_cli.source.modular_index import UNUSED_COMPONENTS
from svdq_cli.source.variants import chosen_variant

_DECODE = "decode"  # the library's name of the block
_BAR = "tqdm"


def is_modular_pipeline(pipe: object) -> bool:
    """Whether a loaded pipeline is one of Modular Diffusers."""
    from diffusers import ModularPipeline

    return isinstance(pipe, ModularPipeline)


def load_modular(
    pipeline_class: Callable[..., Any],
    folder: Path,
    *,
    dtype: torch.dtype,
    components: Mapping[str, object],
) -> Any:
    """The pipeline of a folder whose index was checked. `components` are used as they are; the others are read from
    the folder, never from where the index says they came from."""
    pipe = pipeline_class(pretrained_model_name_or_path=str(folder), local_files_only=True)
    for name in UNUSED_COMPONENTS:
        pipe._blocks.sub_blocks.pop(name, None)  # as the library says to encode prompts as they are written
    there = {name for name, value in pipeline_index(folder).items() if _is_there(value)}
    expected = {spec.name for spec in pipe.blocks.expected_components} - {*UNUSED_COMPONENTS}
    pipe.register_components(
        **{
            name: _component(pipe.get_component_spec(name), folder, name, dtype)
            for name in sorted((there & expected) - components.keys())
        }
    )
    for name, component in components.items():
        setattr(pipe, name, component)
    _name_arguments(pipe)
    _without_bars(pipe._blocks)  # `blocks` is a copy
    return pipe


def _is_there(entry: object) -> bool:
    return isinstance(entry, list) and len(cast("list[object]", entry)) == 2 and entry[0] is not None


def _component(spec: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Read one component from its folder: safetensors only, and no code from there."""
    is_model = spec.type_hint is None or issubclass(spec.type_hint, nn.Module)
    asked: dict[str, Any] = {"use_safetensors": True} if is_model else {}
    if spec.type_hint is None or spec.type_hint.__name__.startswith("Auto"):
        asked["trust_remote_code"] = False
    return spec.load(
        pretrained_model_name_or_path=str(folder),
        subfolder=name,
        variant=chosen_variant(folder / name) if is_model else None,
        revision=None,
        dtype=dtype,
        local_files_only=True,
        **asked,
    )


def answer_of(pipe: Any, arguments: Mapping[str, Any]) -> list[Any]:
    """Call it: images, the frames of videos, sounds, or videos with their sound. Where latents are asked for, it stops
    before the block that decodes them, and answers nothing.

    Raises InputError for blocks that make none of these, or that want a component which the pipeline does not have.
    """
    given = dict(arguments)
    if given.get("output_type") == "latent":
        del given["output_type"]
        with _without_decoding(pipe), _components_named(pipe):
            pipe(**_with_negatives(pipe, given))
        return []
    names = [name for name in OUTPUTS if name in pipe.blocks.output_names]
    if not names:
        made = ", ".join(pipe.blocks.output_names) or "nothing"
        raise InputError(
            f"{type(pipe).__name__} makes {made}, but no images, videos or sounds",
            hint="give a pipeline whose last block decodes them",
        )
    if not {*names} & {*PICTURES}:
        given.pop("output_type", None)  # sounds have forms of their own
    with _components_named(pipe):
        found = pipe(**_with_negatives(pipe, given), output=names)
    return answers_in(pipe, {name: value for name, value in found.items() if value is not None})


@contextmanager
def _without_decoding(pipe: Any) -> Generator[None, None, None]:
    """The pipeline without its last block, where that decodes latents and does nothing else."""
    blocks = pipe._blocks.sub_blocks
    last = list(blocks)[-1:] == [_DECODE] and blocks.pop(_DECODE)
    try:
        yield
    finally:
        if last:
            blocks[_DECODE] = last


@contextmanager
def _components_named(pipe: Any) -> Generator[None, None, None]:
    """Blocks that run into a component that is not there say so of None."""
    try:
        yield
    except (AttributeError, TypeError) as error:
        missing = [name for name in pipe.null_component_names if name not in UNUSED_COMPONENTS]
        if "'NoneType' object" not in str(error) or not missing:
            raise
        raise InputError(
            f"{type(pipe).__name__} was loaded without {', '.join(missing)}, which its blocks need here: {error}",
            hint="put the component's folder beside the pipeline's others, and name it in modular_model_index.json",
        ) from error


def _with_negatives(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen-Image's blocks encode one empty negative prompt, whose batch then differs from that of several prompts."""
    prompts = given.get("prompt")
    name = type(pipe).__name__
    if not isinstance(prompts, list) or len(prompts) < 2 or not name.startswith("QwenImage"):
        return dict(given)
    empty = " " if "Edit" in name else ""  # as the blocks have it
    return {"negative_prompt": [empty] * len(prompts), **given}


@contextmanager
def _without_traces() -> Generator[None, None, None]:
    """Where a block fails, the library writes the traceback of its error to stderr, once for each block around it, and
    raises the error all the same: it is told once."""
    logger = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")

    def is_told(record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith("Error in block:")

    logger.addFilter(is_told)
    try:
        yield
    finally:
        logger.removeFilter(is_told)


def _without_bars(blocks: Any) -> None:
    """The library sets the progress bars of the outermost blocks only."""
    for block in _all_blocks(blocks):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


@contextmanager
def _without_own_bars(pipe: Any) -> Generator[None, None, None]:
    """Blocks of a few models make progress bars of their own, which no setting turns off."""
    modules = {sys.modules[type(block).__module__] for block in _all_blocks(pipe._blocks)}
    own = [module for module in modules if getattr(module, _BAR, None) is tqdm]
    for module in own:
        setattr(module, _BAR, partial(tqdm, disable=True))
    try:
        yield
    finally:
        for module in own:
            setattr(module, _BAR, tqdm)


def _all_blocks(block: Any) -> Iterator[Any]:
    yield block
    for each in getattr(block, "sub_blocks", {}).values():
        yield from _all_blocks(each)


def _name_arguments(pipe: Any) -> None:
    """Give the call a signature that names what its blocks read."""
    own = type(pipe)
    inherited = own.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _without_traces(), _without_own_bars(self):
            return inherited(self, *args, **kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    given = [p for p in inspect.signature(inherited).parameters.values() if p.kind is not p.VAR_KEYWORD]
    read = {param.name: param.default for param in pipe.blocks.inputs if param.name}
    named = [inspect.Parameter(name, keyword, default=default) for name, default in read.items()]
    call.__signature__ = inspect.Signature([*given, *named])  # type: ignore[attr-defined]
    call.__doc__ = inherited.__doc__
    namespace = {"__call__": call, "__module__": own.__module__, "__qualname__": own.__qualname__}
    pipe.__class__ = type(own.__name__, (own,), namespace)
