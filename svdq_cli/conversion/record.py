"""What is seen of the 16-bit model while it generates a few images, for steps that need more than rows of
activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mode
from typing import TYPE_CHECKING

import torch
from torch import nn

from svdq_cli.conversion.memory import run_as_it_fits
from svdq_cli.errors import InputError
from svdq_cli.inference.load import load_16bit_pipeline, load_without_denoiser
from svdq_cli.pack.padding import ceil_div
from svdq_cli.pipelines.batches import Batch, split_batches
from svdq_cli.pipelines.embeddings import EncodedPrompts
from svdq_cli.pipelines.encode import encode_prompts
from svdq_cli.pipelines.generate import generated_batches
from svdq_cli.pipelines.joint import denoisers_in
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.joint import plan_of
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, counts_of, prompts_of
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.reconstruct import Recording, Trajectory, block_graph_of, blocks_of, record_each
from svdq_cli.records import Observer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, slots=True)
class Sample:
    """How many images to generate, and which calls to keep: the first `images` of the calibration's prompts in
    `batches` batches (or fewer images, where the recipe's batch size asks for smaller batches), and at most `calls`
    calls of each batch."""

    images: int
    batches: int
    calls: int
    times: int = 1  # that a prompt may come where there are too few, each time from another noise


# The last quarter of the batches judges. Of many tokens one image is enough for a call.
TUNING_BATCHES, TUNING_CALLS, TUNING_IMAGES_A_CALL, TUNING_TOKENS_A_CALL = 32, 8, 4, 1024
OUTPUT_IMAGES, OUTPUT_BATCHES, OUTPUT_CALLS = 64, 4, 8
# What the last linear is fitted to: images of many tokens need be no more than there are batches
ROWS_PER_CHANNEL = 20


def tuning_sample(prepared: Prepared, sampling: Sampling) -> Sample:
    """What a model is tuned on."""
    tokens = counts_of(prepared, sampling.settings).by_layer[prepared.plan.w4a4[-1].name]
    images = max(1, min(TUNING_IMAGES_A_CALL, TUNING_TOKENS_A_CALL // tokens))
    return Sample(TUNING_BATCHES * images, TUNING_BATCHES, TUNING_CALLS, times=4)


def output_sample(prepared: Prepared, sampling: Sampling) -> Sample:
    """What the last linear is fitted on."""
    layers, settings = prepared.plan.w4a4, sampling.settings
    # the last linear's inputs are as wide as those of attention and the feed-forward, which most layers read
    width = mode(layer.linear.in_features for layer in layers)
    tokens = counts_of(prepared, settings).by_layer[layers[-1].name]
    enough = max(OUTPUT_BATCHES, ceil_div(ROWS_PER_CHANNEL * width, tokens))
    images = min(OUTPUT_IMAGES, enough)
    batches = max(OUTPUT_BATCHES, ceil_div(images, settings.batch_size))
    return Sample(images, batches, OUTPUT_CALLS, times=2)


def record_calls(
    prepared: Prepared,
    sampling: Sampling,
    sample: Sample,
    *,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> dict[str, tuple[nn.Module, list[Trajectory]]]:
    """The 16-bit denoisers, whole on `device`, and their recorded calls, by component."""
    settings = sample_settings(sampling, sample)
    batches = _batches(prepared, sample, settings, options, observe)
    pipe = load_16bit_pipeline(prepared.source, class_name=prepared.plan.model_class, device=device)
    trajectories = _trajectories(prepared, pipe, batches, settings, sample.calls, None, observe)
    return {component: (getattr(pipe, component), found) for component, found in trajectories.items()}


def record_blocks(
    prepared: Prepared,
    sampling: Sampling,
    sample: Sample,
    *,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> dict[str, Recording]:
    """Recorded calls with the block graphs of the denoisers, which need not fit on the device and are freed."""
    settings = sample_settings(sampling, sample)
    batches = _batches(prepared, sample, settings, options, observe)
    pipe = load_without_denoiser(prepared.source, class_name=prepared.plan.model_class, device=device)
    encoded = encode_prompts(pipe, batches, settings=settings, observe=observe)

    def record() -> dict[str, Recording]:
        trajectories = _trajectories(prepared, pipe, batches, settings, sample.calls, encoded, observe)
        return {
            component: Recording(
                found, block_graph_of(getattr(pipe, component), _blocks(component), found[0].calls[0])
            )
            for component, found in trajectories.items()
        }

    def _blocks(component: str) -> tuple[str, ...]:
        return blocks_of(plan_of(prepared.plan, component))

    return run_as_it_fits(
        pipe, prepared, settings, record, device=device, options=options, stage="record", observe=observe
    )


def sample_settings(sampling: Sampling, sample: Sample) -> SamplingSettings:
    """The sampling settings of a sample of the images."""
    settings = sampling.settings
    return replace(settings, batch_size=max(1, min(settings.batch_size, sample.images // sample.batches)))


def _batches(
    prepared: Prepared, sample: Sample, settings: SamplingSettings, options: RunOptions, observe: Observer
) -> tuple[Batch, ...]:
    prompts = prompts_of(prepared, options, observe).texts
    most = min(sample.images, sample.batches * settings.batch_size)
    times = min(sample.times, ceil_div(most, len(prompts)))
    # side by side, so that what judges is of prompts of its own
    return split_batches([prompt for prompt in prompts for _ in range(times)][:most], settings=settings)


def _trajectories(
    prepared: Prepared,
    pipe: DiffusionPipeline,
    batches: Sequence[Batch],
    settings: SamplingSettings,
    most: int,
    encoded: EncodedPrompts | None,
    observe: Observer,
) -> dict[str, list[Trajectory]]:
    """The recorded trajectories by component. Raises InputError for a denoiser that is never called."""

    def calibration_run(batch: Batch) -> Callable[[], object]:
        return lambda: list(
            generated_batches(
                pipe,
                [batch],
                settings=settings,
                total=len(batch.prompts),
                output_type="latent",
                stage="record",
                observe=observe,
                encoded=encoded,
            )
        )

    record_calls = record_each(
        denoisers_in(pipe), map(calibration_run, batches), steps=settings.steps, most=most
    )
    found = {component: record_calls[component] for component in prepared.source.components}
    for component, trajectories in found.items():
        if not trajectories:
            raise InputError(
                f"{component}: the pipeline never ran it in {settings.steps} step{'s' * (settings.steps > 1)}",
                hint="sample with more steps (--steps): each denoiser runs only a part of them",
                where=component,
            )
    return found
