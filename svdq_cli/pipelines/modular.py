"""Pipelines of Modular Diffusers: blocks that share named values, loaded and called as other pipelines are.

A modular pipeline takes whatever its blocks read, and its call names none of it. What is loaded here has a call whose
signature names them, so that all who ask a pipeline what it takes get an answer; it is otherwise the library's own.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdq_cli.errors import InputError
from svdq_cli.source import pipeline_index

if TYPE_CHECKING:
    import torch

# What the last block leaves behind, by what it is called
OUTPUTS = ("images", "videos", "frames", "audios", "audio")


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
    wanted = {
        name: value
        for name, value in pipeline_index(folder).items()
        if isinstance(value, list) and len(value) == 2 and name not in components
    }
    found = {
        name: pipe.get_component_spec(name).load(
            pretrained_model_name_or_path=str(folder),
            subfolder=name,
            variant=None,
            revision=None,
            dtype=dtype,
            local_files_only=True,
        )
        for name, (library, _) in wanted.items()
        if library is not None
    }
    pipe.register_components(**found)
    for name, component in components.items():
        setattr(pipe, name, component)
    _name_arguments(pipe)
    _without_bars(pipe._blocks)  # `blocks` is a copy
    return pipe


def answer_of(pipe: Any, arguments: Mapping[str, Any]) -> list[Any]:
    """Call it: images, the frames of videos, or sounds. Decoded even where latents would do: few blocks leave them."""
    names = pipe.blocks.output_names
    made = next((name for name in OUTPUTS if name in names), None)
    if made is None:
        raise InputError(
            f"{type(pipe).__name__} makes {', '.join(names) or 'nothing'}, but no images or videos",
            hint="give a pipeline whose last block decodes images",
        )
    given = {name: value for name, value in arguments.items() if (name, value) != ("output_type", "latent")}
    return list(pipe(**_with_negatives(pipe, given), output=made))


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
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in getattr(blocks, "sub_blocks", {}).values():
        _without_bars(block)


def _name_arguments(pipe: Any) -> None:
    """Give the call a signature that names what its blocks read."""
    own = type(pipe)
    inherited = own.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _without_traces():
            return inherited(self, *args, **kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    given = [p for p in inspect.signature(inherited).parameters.values() if p.kind is not p.VAR_KEYWORD]
    read = {param.name: param.default for param in pipe.blocks.inputs if param.name}
    named = [inspect.Parameter(name, keyword, default=default) for name, default in read.items()]
    call.__signature__ = inspect.Signature([*given, *named])  # type: ignore[attr-defined]
    call.__doc__ = inherited.__doc__
    namespace = {"__call__": call, "__module__": own.__module__, "__qualname__": own.__qualname__}
    pipe.__class__ = type(own.__name__, (own,), namespace)
