"""`svdq eval --plan`: which passes there would be, what each is for, and how long they take; nothing is sampled."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from svdq_cli.checkpoint.reader import NAME_AGAINST, open_checkpoint
from svdq_cli.conversion.machine_speed import speed_of
from svdq_cli.conversion.predict import pass_seconds
from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.evaluation.gates import require_measurable
from svdq_cli.evaluation.image_store import RUN_FILE, ImageStore
from svdq_cli.evaluation.passes import PASSES, Pass
from svdq_cli.inference.backend import choose_backend, compute_dtype
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import counts_of, prepare
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.prepare.sampling import sampling_for, with_model_sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Recipe
from svdq_cli.records import Observer, ignore_events
from svdq_cli.reports import EvalPlanReport, PassFacts
from svdq_cli.runtime.nf4 import require_nf4
from svdq_cli.source import only
from svdq_cli.storage.atomic import existing
from svdq_cli.system.machine import resolve_device

# Times are ranges, as factors of what the layers' products take at this machine's measured rate. Not in the products:
# attention, the autoencoder, the text encoders, and whatever else the machine does.
SIXTEEN_BIT_RANGE = (0.5, 2.5)
REFERENCE_RANGE = (0.5, 4.0)  # of the 4-bit layers in plain torch, which quantize activations besides


def plan_evaluation(
    path: Path,
    recipe: Recipe,
    *,
    report_folder: Path | None = None,
    without: Collection[str] = (),
    backend: str = "auto",
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> EvalPlanReport:
    """What `evaluate` with the same arguments would do; images that `report_folder` holds already are not counted."""
    source = source_of(recipe, options)
    checkpoint = open_checkpoint(path, base=source.pipeline, hint=NAME_AGAINST)
    source = only(source, checkpoint.source.components)
    recipe = with_model_sampling(recipe, source, held_out=True)
    prompts = len(chosen_prompts(recipe, options, observe).texts)
    prepared = prepare(recipe, beside=options.beside, every_layer=True, source=source)
    sampling = prepared.sampling or sampling_for(recipe, source, beside=options.beside)
    settings, device = sampling.settings, resolve_device(options.device)
    speed = speed_of(device, compute_dtype(device), existing(report_folder or Path()))
    require_measurable(recipe.gates, source, settings, device, images=prompts, without=without)
    counts = counts_of(prepared, settings)
    once = pass_seconds(prepared.plan, counts, speed)
    each = settings.steps * counts.passes.count  # of the denoiser for an image
    on_kernels = choose_backend(backend, device, checkpoint.dtype).name == "kernels"
    lacking = _lacking(device.type)
    found: list[PassFacts] = []
    for wanted in PASSES:
        images = _images(wanted, prompts, settings.batch_size, report_folder)
        if wanted.key in without or wanted.key in lacking:
            continue
        calls = images * each
        low, high = REFERENCE_RANGE if wanted.four_bit else SIXTEEN_BIT_RANGE
        # no 4-bit kernel's rate was measured here
        seconds = None if wanted.four_bit and on_kernels else (low * calls * once, high * calls * once)
        found.append(PassFacts(wanted.title, wanted.key, wanted.why, images, calls, seconds))
    known = [each.seconds for each in found if each.seconds is not None]
    return EvalPlanReport(
        images=prompts,
        steps=settings.steps,
        width=settings.width,
        height=settings.height,
        frames=settings.frames or 1,
        passes=tuple(found),
        seconds=(sum(low for low, _ in known), sum(high for _, high in known))
        if len(known) == len(found)
        else None,
        basis=f"the layers' products at the measured rate of this machine's {device.type}; the range allows for "
        "attention, autoencoder and text encoders",
        missing={**{key: f"skipped by --without {key}" for key in without}, **lacking},
        warnings=source.warnings,
    )


def _images(wanted: Pass, prompts: int, batch: int, folder: Path | None) -> int:
    """What a pass samples: whole batches, less what is there."""
    count = prompts if wanted.most is None else min(prompts, wanted.most)
    if wanted.way is None:
        return count
    there = folder is not None and (folder / RUN_FILE).is_file()
    missing = ImageStore(folder).missing(wanted.way, count) if folder is not None and there else range(count)
    batches = {index // batch for index in missing}
    return sum(min(batch, prompts - first * batch) for first in batches)


def _lacking(device: str) -> dict[str, str]:
    """Passes that can't be made here, and why."""
    import torch

    try:
        require_nf4(torch.device(device))
    except EnvironmentLacksError as lack:
        return {"nf4": f"{lack.message}; {lack.hint}"}
    return {}
