"""The 16-bit model with the trajectories of a few pictures, for steps that need the model itself and not only rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from svdq_cli.calibrate.pipelines import draw
from svdq_cli.loading import load_16bit_pipeline
from svdq_cli.preparing import Prepared, RunOptions, chosen_prompts, draw_settings
from svdq_cli.reconstruct import Trajectory, record_trajectories
from svdq_cli.records import Observer


def can_record(prepared: Prepared) -> bool:
    """Whether there are prompts, and a whole pipeline to draw them with."""
    return prepared.recipe.calibration is not None and prepared.source.pipeline is not None


def recorded(
    prepared: Prepared,
    *,
    pictures: int,
    batches: int,
    calls: int,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> tuple[nn.Module, list[Trajectory]]:
    """The 16-bit model on `device`, and at most `calls` calls of each batch of pictures that it drew.

    Draws the first `pictures` of the calibration's prompts in `batches` batches (or fewer pictures, where the recipe's
    batch size asks for smaller batches).
    """
    source = prepared.source
    settings = draw_settings(prepared.recipe, source, beside=options.beside)
    settings = replace(settings, batch_size=max(1, min(settings.batch_size, pictures // batches)))
    prompts = chosen_prompts(prepared.recipe, options, observe)[
        : min(pictures, batches * settings.batch_size)
    ]
    pipe = load_16bit_pipeline(source, class_name=prepared.plan.model_class, device=device)
    model = getattr(pipe, source.component)

    def drawing(first: int, part: Sequence[str]) -> Callable[[], object]:
        own = replace(settings, seed=settings.seed + first)
        return lambda: draw(pipe, part, settings=own, stage="record", observe=observe)

    size = settings.batch_size
    draws = [drawing(first, prompts[first : first + size]) for first in range(0, len(prompts), size)]
    return model, record_trajectories(model, draws, steps=settings.steps, most=calls)
