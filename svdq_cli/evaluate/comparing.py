"""The same prompts and seeds drawn by the 16-bit model, by the baselines and by the checkpoint, and compared."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svdq_cli import __version__
from svdq_cli.calibrate.joint import joint_model
from svdq_cli.calibrate.pipelines import draw_each
from svdq_cli.calibrate.settings import DrawSettings, settings_json
from svdq_cli.checkpoint import Checkpoint, open_checkpoint
from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.evaluate.gallery import (
    Gallery,
    keep_picture,
    note_time,
    open_gallery,
    seconds_per_picture,
)
from svdq_cli.evaluate.judging import JudgedLayers, judge_layers, keep_layers, kept_layers
from svdq_cli.evaluate.metrics import Metrics, find_metrics
from svdq_cli.evaluate.scoring import Scores, score_pairs, score_pictures
from svdq_cli.loading import (
    choose_backend,
    compute_dtype,
    load_16bit_pipeline,
    load_pipeline,
    replace_layers,
)
from svdq_cli.machine import resolve_device
from svdq_cli.origin import Origin, origin_of
from svdq_cli.preparing import (
    DEFAULT_OPTIONS,
    RunOptions,
    chosen_prompts,
    sampling_for,
    source_of,
    with_model_sampling,
)
from svdq_cli.recipe import Recipe, figure_of, section_of
from svdq_cli.records import (
    BaselineFacts,
    EvalReport,
    Event,
    LayerPlan,
    Observer,
    ReferenceFacts,
    Summary,
    W4A4Plan,
    ignore_events,
    to_json,
)
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.naive import naive_solution
from svdq_cli.runtime.nf4 import nf4_linear, require_nf4
from svdq_cli.solve.modulation import solve_w4a16
from svdq_cli.source import Source, file_sha256, only, read_tensor, source_digest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SQNR_PROMPTS = 8  # of the judged prompts; rows come from all their timesteps
NOISE_PICTURES = 4  # redrawn with the 16-bit model to see its own run-to-run noise

# Ways of drawing: the folders of the pictures. Baselines are called by their JSON keys.
SIXTEEN_BIT, AGAIN, CONVERTED = "16bit", "16bit-again", "converted"
NAIVE, NF4 = "rtn", "nf4"
TITLES = {
    SIXTEEN_BIT: "16-bit",
    AGAIN: "16-bit again",
    CONVERTED: "SVDQuant",
    NAIVE: "naive 4-bit",
    NF4: "bitsandbytes NF4",
}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What is drawn, with what."""

    path: Path
    checkpoint: Checkpoint
    source: Source  # the 16-bit model, with the LoRAs that the checkpoint holds
    origin: Origin  # whether that is what the checkpoint was made from
    prompts: tuple[str, ...]
    settings: DrawSettings
    device: torch.device


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The figures of an evaluation, and what they were taken from. `scores` by way of drawing; `facts`: what the
    pictures depend on besides the prompts."""

    run: Run
    facts: Mapping[str, object]
    report: EvalReport
    gallery: Gallery
    scores: Mapping[str, Scores]
    metrics: Metrics
    layers: JudgedLayers


def compare_in(
    folder: Path,
    path: Path,
    recipe: Recipe,
    *,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> Evaluation:
    """Draw what is missing in `folder` of the checkpoint at `path`, of the recipe's source and of the baselines; score
    all of it. A folder with pictures of another run is refused.
    """
    started = time.monotonic()
    run = _run(path, recipe, options, observe)
    facts = _facts(run)
    gallery = open_gallery(folder, facts, run.prompts, overwrite=options.overwrite)
    layers = _draw_16bit_and_naive(run, gallery, observe)
    missing = _draw_nf4(run, gallery, observe)
    draw_missing(gallery, CONVERTED, run, lambda: _converted_pipeline(run), observe)
    metrics = find_metrics(run.device, pictures=len(run.prompts))
    ways = [CONVERTED, NAIVE, *([] if missing else [NF4])]
    scores = {way: score_pairs(gallery, SIXTEEN_BIT, way, run.prompts, metrics, observe) for way in ways}
    report = _report(run, gallery, scores, metrics, layers, missing=missing, started=started, observe=observe)
    return Evaluation(run, facts, _gated(report, recipe), gallery, scores, metrics, layers)


def draw_missing(
    gallery: Gallery,
    way: str,
    run: Run,
    load: Callable[[], DiffusionPipeline],
    observe: Observer,
    *,
    count: int | None = None,
) -> None:
    """The pictures that are not there yet, of the first `count` prompts. `load` is called only where some are.

    They are drawn in the batches of the whole run, which on some machines decide the last bits.
    """
    missing = set(gallery.missing(way, len(run.prompts[:count])))
    if not missing:
        return
    pipe = load()
    started = time.monotonic()
    drawn = draw_each(
        pipe,
        run.prompts,
        settings=run.settings,
        stage=f"draw {TITLES.get(way, way)}",
        observe=observe,
        wanted=missing.__contains__,
    )
    kept = 0
    for index, picture in drawn:
        keep_picture(gallery, way, index, picture)
        kept += 1
    note_time(gallery, way, pictures=kept, seconds=time.monotonic() - started)


def _run(path: Path, recipe: Recipe, options: RunOptions, observe: Observer) -> Run:
    checkpoint = open_checkpoint(path)
    source = only(source_of(recipe, options), checkpoint.source.components)
    if source.pipeline is None:
        raise InputError(
            f"{source.path}: evaluation draws pictures, and this is not a whole pipeline",
            hint="give the pipeline folder that the checkpoint was made from, or --base for the parts that are missing",
            where=str(source.path),
        )
    origin = origin_of(checkpoint, recipe, options)
    for note in origin.notes:
        observe(Event("warning", "evaluate", detail=note))
    recipe = with_model_sampling(recipe, origin.source, held_out=True)
    prompts = chosen_prompts(recipe, options, observe).texts
    settings = sampling_for(recipe, origin.source, beside=options.beside).settings
    return Run(path, checkpoint, origin.source, origin, prompts, settings, resolve_device(options.device))


def _facts(run: Run) -> dict[str, object]:
    """What the pictures depend on besides the prompts."""
    settings = settings_json(run.settings)
    del settings["batch_size"]  # a picture does not depend on the batch it was drawn in
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    return {
        "checkpoint": {file.name: file_sha256(file) for file in run.checkpoint.source.files},
        "source": run.origin.digest or source_digest(run.source),
        "other components": _component_sizes(run.source),
        "settings": settings,
        "device": gpu,
        "backend": choose_backend("auto", run.device, run.checkpoint.dtype).name,
        "svdq": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _component_sizes(source: Source) -> dict[str, int]:
    """Bytes of the weight files of text encoders and autoencoder: they are rarely swapped, and long to digest."""
    if source.pipeline is None:
        return {}
    files = sorted(source.pipeline.glob("*/*.safetensors"))
    return {
        file.relative_to(source.pipeline).as_posix(): file.stat().st_size
        for file in files
        if file.parent.name not in source.components
    }


def _draw_16bit_and_naive(run: Run, gallery: Gallery, observe: Observer) -> JudgedLayers:
    """What the 16-bit pipeline is loaded for: its pictures, its noise, what its layers read, and the naive baseline,
    for which it is taken apart at last."""
    pipe: DiffusionPipeline | None = None

    def loaded() -> DiffusionPipeline:
        nonlocal pipe
        pipe = pipe or _sixteen_bit_pipeline(run)
        return pipe

    def naive() -> DiffusionPipeline:
        with_naive = loaded()
        _replace(with_naive, run, _naive_layer)
        return with_naive

    draw_missing(gallery, SIXTEEN_BIT, run, loaded, observe)
    draw_missing(gallery, AGAIN, run, loaded, observe, count=NOISE_PICTURES)
    layers = _judged(run, gallery, loaded, observe)
    draw_missing(gallery, NAIVE, run, naive, observe)
    return layers


def _judged(
    run: Run, gallery: Gallery, loaded: Callable[[], DiffusionPipeline], observe: Observer
) -> JudgedLayers:
    path = gallery.folder / "layers.safetensors"
    prompts = run.prompts[:SQNR_PROMPTS]
    if (found := kept_layers(path, run.checkpoint, run.source, prompts=len(prompts))) is not None:
        return found
    pipe = loaded()
    model = joint_model(pipe, run.source.components)
    found = judge_layers(pipe, model, run.checkpoint, run.source, prompts, run.settings, observe)
    keep_layers(path, found, prompts=len(prompts))
    return found


def _draw_nf4(run: Run, gallery: Gallery, observe: Observer) -> dict[str, str]:
    """The baseline of bitsandbytes, or why there is none."""
    try:
        require_nf4(run.device)
    except EnvironmentLacksError as lack:
        return {NF4: f"{lack.message}; {lack.hint}"}

    def nf4() -> DiffusionPipeline:
        pipe = _sixteen_bit_pipeline(run)
        _replace(pipe, run, _nf4_layer)
        return pipe

    draw_missing(gallery, NF4, run, nf4, observe)
    return {}


def _sixteen_bit_pipeline(run: Run) -> DiffusionPipeline:
    return load_16bit_pipeline(run.source, class_name=run.checkpoint.model_class, device=run.device)


def _converted_pipeline(run: Run) -> DiffusionPipeline:
    # a single file has no other components of its own
    base = run.checkpoint.source.pipeline or run.source.pipeline
    return load_pipeline(run.path, device=run.device, base=base)


MakeLayer = Callable[[Run, LayerPlan, Tensor, Tensor | None], nn.Module]


def _replace(pipe: DiffusionPipeline, run: Run, make: MakeLayer) -> None:
    """The layers that the checkpoint converts, made from the 16-bit weights in another way."""
    layers: dict[str, nn.Module] = {}
    for plan in run.checkpoint.layers:
        weight = read_tensor(run.source, f"{plan.name}.weight").flatten(1)
        bias = read_tensor(run.source, f"{plan.name}.bias") if plan.linear.bias else None
        layers[plan.name] = make(run, plan, weight, bias).to(run.device)
    replace_layers(pipe, run.source.components, layers)


def _naive_layer(run: Run, plan: LayerPlan, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Rounded to nearest, nothing else."""
    dtype = run.checkpoint.dtype
    if isinstance(plan, W4A4Plan):
        return quantized_linear(naive_solution(plan, weight, bias, dtype))
    bias = None if bias is None else bias.float()
    return quantized_linear(solve_w4a16(plan, weight.float(), bias, dtype=dtype))


def _nf4_layer(run: Run, plan: LayerPlan, weight: Tensor, bias: Tensor | None) -> nn.Module:
    return nf4_linear(weight, bias, dtype=compute_dtype(run.device))


def _report(
    run: Run,
    gallery: Gallery,
    scores: Mapping[str, Scores],
    metrics: Metrics,
    layers: JudgedLayers,
    *,
    missing: Mapping[str, str],
    started: float,
    observe: Observer,
) -> EvalReport:
    own = score_pictures(gallery, SIXTEEN_BIT, run.prompts, metrics)
    noise = score_pairs(
        gallery, SIXTEEN_BIT, AGAIN, run.prompts[:NOISE_PICTURES], Metrics({}, {}, None, {}), observe
    )
    floor = noise.summary("psnr_db")
    facts = {way: facts_of(gallery, way, found) for way, found in scores.items()}
    converted = facts.pop(CONVERTED)
    return EvalReport(
        images=len(run.prompts),
        psnr_db=converted.psnr_db,
        ssim=converted.ssim,
        lpips=converted.lpips,
        clip=converted.clip,
        image_reward=converted.image_reward,
        fid=converted.fid,
        reference=ReferenceFacts(
            own.summary("clip"), own.summary("image_reward"), seconds_per_picture(gallery, SIXTEEN_BIT)
        ),
        baselines=facts,
        layer_sqnr_db=layers.sqnr,
        noise_floor_psnr_db=None if floor is None else floor.mean,
        missing={**metrics.missing, **missing},
        seconds_per_picture=converted.seconds_per_picture,
        seconds=time.monotonic() - started,
        same_source=run.origin.same,
        loras=run.origin.loras,
        warnings=run.origin.notes,
    )


def facts_of(gallery: Gallery, way: str, scores: Scores) -> BaselineFacts:
    """One way of drawing as a report has it."""
    return BaselineFacts(
        psnr_db=_always(scores, "psnr_db"),
        ssim=_always(scores, "ssim"),
        lpips=scores.summary("lpips"),
        clip=scores.summary("clip"),
        image_reward=scores.summary("image_reward"),
        fid=scores.fid,
        seconds_per_picture=seconds_per_picture(gallery, way),
    )


def _always(scores: Scores, metric: str) -> Summary:
    found = scores.summary(metric)
    assert found is not None
    return found


def _gated(report: EvalReport, recipe: Recipe) -> EvalReport:
    """A gate on a figure that could not be measured is missed: nobody knows that it holds."""
    plain = to_json(report)
    missed: list[str] = []
    for gate in recipe.gates:
        value, section = figure_of(gate, plain), section_of(gate)
        if value is not None and not gate.holds(value):
            missed.append(f"{gate} (is {value:.4g})")
        elif section in plain and plain[section] is None:
            missed.append(f"{gate} (not measured: {report.missing.get(section, 'no such figure')})")
    if not missed:
        return report
    return replace(report, status="gate-missed", gates_missed=tuple(missed))
