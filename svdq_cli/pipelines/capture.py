"""A pipeline's own arguments for its denoiser, without running it: the denoiser is an empty model that stops the run.

What `made_arguments` can't put together from names and widths (packed shapes, masks, position tables) the pipeline
makes from a prompt. Its text encoders are loaded and run, the denoiser's weights are not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from svdq_cli.pipelines.batches import split_batches
from svdq_cli.pipelines.first_call import Arguments, first_call
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.structure import Reading
from svdq_cli.planning.trace_inputs import watch_call
from svdq_cli.source import is_denoiser, pipeline_index

_PROMPT = "a photograph"
_SIDE = 256  # pixels


def watch_in_pipeline(
    folder: Path, component: str, model: nn.Module, settings: SamplingSettings
) -> dict[str, Reading] | None:
    """What every linear of `model` (on the meta device) reads, called as the pipeline in `folder` calls it; None where
    either can't be run."""
    try:
        args, kwargs = _arguments(folder, component, model, settings)
        return watch_call(model, kwargs, args)
    except Exception:  # whatever keeps a pipeline or a model from running: the plan does without
        return None


def _arguments(folder: Path, component: str, model: nn.Module, settings: SamplingSettings) -> Arguments:
    """Arguments of the denoiser's first call, for a small image: what layers read is the same at any size."""
    # one that is called before this one ends the run: the plan does without
    others = {name: None for name in pipeline_index(folder) if is_denoiser(name) and name != component}
    pipe = load_source_pipeline(
        folder, dtype=torch.float32, device=None, components={**others, component: model}
    )
    small = replace(settings, height=min(settings.height, _SIDE), width=min(settings.width, _SIDE))
    batch = split_batches([_PROMPT], settings=small)[0]
    given = first_call(pipe, [model], batch, settings=small)
    if given is None:
        raise RuntimeError(f"{type(pipe).__name__} never called its {component}")
    return given
