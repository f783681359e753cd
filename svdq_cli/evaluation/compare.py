"""Images of the same prompts and seeds by the 16-bit model, the baselines and the checkpoint, compared."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from svdq_cli import __version__
from svdq_cli.checkpoint.reader import NAME_AGAINST, open_checkpoint
from svdq_cli.errors import InputError
from svdq_cli.evaluation.gates import gated, require_measurable
from svdq_cli.evaluation.image_store import ImageStore, open_image_store
from svdq_cli.evaluation.images import summarize
from svdq_cli.evaluation.layer_sqnr import JudgedLayers
from svdq_cli.evaluation.pass_times import time_of
from svdq_cli.evaluation.passes import (
    AGAIN,
    CONVERTED,
    NAIVE,
    NF4,
    NOISE_IMAGES,
    NUDGED,
    SIXTEEN_BIT,
    TITLES,
    Run,
    Sampled,
    sample_all,
)
from svdq_cli.evaluation.plausible import ImageProblems
from svdq_cli.evaluation.score import Loaded, Scores, load_metrics, score_images, score_pairs
from svdq_cli.evaluation.verdict import Evidence, next_step, verdict_of
from svdq_cli.inference.backend import choose_backend
from svdq_cli.pipelines.settings import settings_json
from svdq_cli.prepare.facts import other_weights
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.origin import origin_of
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.prepare.sampling import sampling_for, with_model_sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Recipe
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.reports import BaselineFacts, EvalReport, ImageFacts, ReferenceFacts
from svdq_cli.source import file_sha256, only, source_digest
from svdq_cli.storage.videos import USUAL_FPS
from svdq_cli.system.machine import resolve_device


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The figures of an evaluation, and what they were taken from. `scores` by way of sampling; `facts`: what the
    images depend on besides the prompts."""

    run: Run
    facts: Mapping[str, object]
    report: EvalReport
    image_store: ImageStore
    scores: Mapping[str, Scores]
    metrics: Loaded
    layers: JudgedLayers


def compare_in(
    folder: Path,
    path: Path,
    recipe: Recipe,
    *,
    without: Collection[str] = (),
    backend: str = "auto",
    page: str | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> Evaluation:
    """Generate what is missing in `folder` of the checkpoint at `path`, of the recipe's source and of the baselines;
    score all of it. A folder with images of another run is refused. `without`: passes to leave out
    (`OPTIONAL_PASSES`). `backend`: see `load_pipeline`. `page`: where the HTML report will be.
    """
    started = time.monotonic()
    run = _run(path, recipe, backend, options, observe)
    require_measurable(
        recipe.gates, run.source, run.settings, run.device, images=len(run.prompts), without=without
    )
    facts = _facts(run)
    fps = run.settings.fps or USUAL_FPS
    image_store = open_image_store(folder, facts, run.prompts, overwrite=options.overwrite, fps=fps)
    sampled = sample_all(run, image_store, without, observe)
    metrics = load_metrics(run.device, images=len(run.prompts))
    ways = [CONVERTED, *(way for way in (NAIVE, NF4) if way not in sampled.missing)]
    noise = _noise(run, image_store, sampled, metrics, observe)
    scores = {
        way: replace(
            score_pairs(
                image_store, SIXTEEN_BIT, way, run.prompts, metrics, observe, stage=f"score {TITLES[way]}"
            ),
            noise=noise,
        )
        for way in ways
    }
    report = _report(run, image_store, scores, metrics, sampled, page=page, started=started, observe=observe)
    return Evaluation(run, facts, report, image_store, scores, metrics, sampled.layers)


def _noise(
    run: Run, image_store: ImageStore, sampled: Sampled, metrics: Loaded, observe: Observer
) -> Mapping[str, list[float]]:
    """Differences of each metric, image by image, between the checkpoint and the checkpoint with nudged start noise."""
    prompts = run.prompts[:NOISE_IMAGES]
    if "own_noise_psnr_db" in sampled.missing:
        return {}
    own, nudged = (
        score_pairs(
            image_store,
            SIXTEEN_BIT,
            way,
            prompts,
            metrics.without_networks(),
            observe,
            stage=f"score noise: {TITLES[way]}",
        ).per_image
        for way in (CONVERTED, NUDGED)
    )
    return {metric: [a - b for a, b in zip(own[metric], nudged[metric], strict=True)] for metric in own}


def _run(path: Path, recipe: Recipe, backend: str, options: RunOptions, observe: Observer) -> Run:
    source = source_of(recipe, options)
    checkpoint = open_checkpoint(path, base=source.pipeline, hint=NAME_AGAINST)
    source = only(source, checkpoint.source.components)
    if source.pipeline is None:
        raise InputError(
            f"{source.path}: evaluation generates images, but this is not a whole pipeline",
            hint="give the pipeline folder that the checkpoint was made from, or --base for the missing parts",
            where=str(source.path),
        )
    origin = origin_of(checkpoint, recipe, options)
    for note in origin.notes:
        observe(Event("warning", "evaluate", detail=note))
    recipe = with_model_sampling(recipe, origin.source, held_out=True)
    prompts = chosen_prompts(recipe, options, observe).texts
    settings = sampling_for(recipe, origin.source, beside=options.beside).settings
    device = resolve_device(options.device)
    chosen = choose_backend(backend, device, checkpoint.dtype)
    return Run(
        *(path, checkpoint, origin.source, origin, recipe, prompts, settings, device),
        backend=chosen,
        asked_backend=backend,
    )


def _facts(run: Run) -> dict[str, object]:
    """What the images depend on besides the prompts."""
    settings = settings_json(run.settings)
    del settings["batch_size"]  # an image does not depend on the batch it was generated in
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    return {
        "checkpoint": {file.name: file_sha256(file) for file in run.checkpoint.source.files},
        "source": run.origin.digest or source_digest(run.source),
        # By their sizes: text encoders and autoencoder are rarely swapped, and long to digest
        "other components": other_weights(run.source),
        "settings": settings,
        "device": gpu,
        "backend": run.backend.label,
        "svdq": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _report(
    run: Run,
    image_store: ImageStore,
    scores: Mapping[str, Scores],
    metrics: Loaded,
    sampled: Sampled,
    *,
    page: str | None,
    started: float,
    observe: Observer,
) -> EvalReport:
    own = score_images(image_store, SIXTEEN_BIT, run.prompts, metrics)
    missing, problems = sampled.missing, sampled.problems
    chance = partial(_chance_psnr_db, run, image_store, metrics, observe)
    floor = None if "noise_floor_psnr_db" in missing else chance(SIXTEEN_BIT, AGAIN)
    own_noise = None if "own_noise_psnr_db" in missing else chance(CONVERTED, NUDGED)
    facts = {way: facts_of(image_store, way, found) for way, found in scores.items()}
    converted = facts.pop(CONVERTED)
    evidence = Evidence(
        converted=scores[CONVERTED].per_image["psnr_db"],
        naive=scores[NAIVE].per_image["psnr_db"] if NAIVE in scores else None,
        noise=scores[CONVERTED].noise.get("psnr_db", ()),
        floor_db=floor,
        own_noise_db=own_noise,
        problems=problems,
        converted_problems=sampled.converted_problems,
        source_mismatch=run.origin.source_mismatch,
        data_free=(run.checkpoint.provenance or {}).get("calibration_sha256") is None,
        kind=problems.kind,
    )
    report = EvalReport(
        images=len(run.prompts),
        figures=converted.figures,
        reference=ReferenceFacts(own.figures("image"), **_time_facts(image_store, SIXTEEN_BIT)),
        baselines=facts,
        layer_sqnr_db=sampled.layers.sqnr,
        noise_floor_psnr_db=floor,
        own_noise_psnr_db=own_noise,
        output_sqnr_db=sampled.outputs,
        sixteen_bit_images=_image_facts(problems),
        verdict=verdict_of(evidence),
        next="",
        missing={**metrics.missing, **missing},
        **_time_facts(image_store, CONVERTED),
        backend=run.backend.sentence,
        seconds=time.monotonic() - started,
        video=converted.video,
        page=page,
        same_source=run.origin.same,
        loras=run.origin.loras,
        warnings=(
            *run.origin.notes,
            *problems.sentences("16-bit"),
            *sampled.converted_problems.sentences("4-bit"),
        ),
    )
    report = gated(report, run.recipe)
    missed = bool(report.gates_missed)
    return replace(report, next=next_step(evidence, checkpoint=str(run.path), page=page, gate_missed=missed))


def _image_facts(problems: ImageProblems) -> ImageFacts:
    return ImageFacts(problems.black, problems.nearly_uniform, problems.alike, problems.meaningless)


def _chance_psnr_db(
    run: Run, image_store: ImageStore, metrics: Loaded, observe: Observer, first: str, second: str
) -> float:
    """Mean PSNR of two passes that differ by chance alone."""
    found = score_pairs(
        image_store,
        first,
        second,
        run.prompts[:NOISE_IMAGES],
        metrics.without_networks(),
        observe,
        stage=f"score {TITLES[second]} against {TITLES[first]}",
    )
    return summarize(found.per_image["psnr_db"]).mean


def facts_of(image_store: ImageStore, way: str, scores: Scores) -> BaselineFacts:
    """One way of sampling as a report has it."""
    return BaselineFacts(
        scores.figures("pair", "image", "all images"),
        **_time_facts(image_store, way),
        video=scores.video.facts(image_store.fps) if scores.video else None,
    )


class _TimeFacts(TypedDict):
    """The fields of a report that hold the time of one way of sampling."""

    seconds_per_picture: float | None
    processor_seconds_per_picture: float | None
    machine_was_busy: bool | None


def _time_facts(image_store: ImageStore, way: str) -> _TimeFacts:
    taken = time_of(image_store.folder, way)
    return _TimeFacts(
        seconds_per_picture=taken and taken.wall,
        processor_seconds_per_picture=taken and taken.processor,
        machine_was_busy=taken and taken.was_busy,
    )
