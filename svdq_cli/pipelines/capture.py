"""A pipeline's own arguments for its denoiser, without running it: the denoiser is an empty model that stops the run.

What `watching` can't put together from names and widths (packed shapes, masks, position tables) the pipeline makes from
a prompt. Its text encoders are loaded and run, the denoiser's weights are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from svdq_cli.pipelines.first_call import Arguments, first_call
from svdq_cli.pipelines.generate import load_source_pipeline, split_batches
from svdq_cli.pipelines.settings import DrawSettings
from svdq_cli.planning.structure import Reading
from svdq_cli.planning.trace_inputs import watch_call
from svdq_cli.source import is_denoiser, pipeline_index

_PROMPT = "a photograph"


def watch_in_pipeline(
    folder: Path, component: str, model: nn.Module, settings: DrawSettings
) -> dict[str, Reading] | None:
    """What every linear of `model` (on the meta device) reads, called as the pipeline in `folder` calls it; None where
    either can't be run."""
    try:
        args, kwargs = _arguments(folder, component, model, settings)
        return watch_call(model, kwargs, args)
    except Exception:  # whatever keeps a pipeline or a model from running: the plan does without
        return None


def _arguments(folder: Path, component: str, model: nn.Module, settings: DrawSettings) -> Arguments:
    """Of the denoiser's first call, without their numbers."""
    # one that is called before this one ends the run: the plan does without
    others = {name: None for name in pipeline_index(folder) if is_denoiser(name) and name != component}
    pipe = load_source_pipeline(
        folder, dtype=torch.float32, device=None, components={**others, component: model}
    )
    batch = split_batches([_PROMPT], settings=settings)[0]
    given = first_call(pipe, [model], batch, settings=settings)
    if given is None:
        raise RuntimeError(f"{type(pipe).__name__} never called its {component}")
    return tree_map(_to_meta, given)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
