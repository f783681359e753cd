"""The verbs that draw: evaluate (16-bit pictures against 4-bit ones) and generate (one picture)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from svdq_cli.calibrate.pipelines import draw
from svdq_cli.calibrate.settings import DrawSettings
from svdq_cli.checkpoint import Checkpoint, open_checkpoint
from svdq_cli.errors import InputError, UsageError
from svdq_cli.evaluate.grid import picture_grid
from svdq_cli.evaluate.images import compare
from svdq_cli.judging import JudgedLayers, judge_layers
from svdq_cli.loading import Backend, load_16bit_pipeline, load_pipeline
from svdq_cli.locate import DEMO_SOURCES
from svdq_cli.machine import resolve_device
from svdq_cli.preparing import DEFAULT_OPTIONS, RunOptions, chosen_prompts, draw_settings, source_of
from svdq_cli.recipe import Calibration, Recipe, default_recipe, figure_of
from svdq_cli.records import (
    BaselineFacts,
    EvalReport,
    GenerateReport,
    Observer,
    W4A4Plan,
    ignore_events,
    json_text,
    to_json,
)
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.naive import naive_solution
from svdq_cli.runtime.replace import replace_linears
from svdq_cli.solve.modulation import solve_w4a16
from svdq_cli.source import Source, read_tensor
from svdq_cli.writing import refuse_existing

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

SQNR_PROMPTS = 8  # of the judged prompts; rows come from all their timesteps
GRID_ROWS = 8  # prompts shown in the picture grid
NOISE_PICTURES = 2  # redrawn with the 16-bit model to see its own run-to-run noise


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """The same prompts and seeds, drawn three ways."""

    prompts: tuple[str, ...]
    sixteen_bit: Sequence[Image]
    naive: Sequence[Image]
    converted: Sequence[Image]


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The figures of an evaluation, and what they were taken from."""

    report: EvalReport
    pictures: Pictures
    layers: JudgedLayers


def evaluation_recipe(checkpoint: Checkpoint, source: str) -> Recipe:
    """How a checkpoint is judged by default: drawn as it was calibrated, on prompts it was not calibrated with."""
    made_with = (checkpoint.provenance or {}).get("recipe")
    known = Recipe.model_validate(made_with) if isinstance(made_with, Mapping) else default_recipe(source)
    demo = source in DEMO_SOURCES or known.model.source in DEMO_SOURCES
    held_out = "calib_prompts/demo_eval.txt" if demo else "calib_prompts/general_eval.txt"
    base = known.calibration or (demo_calibration() if demo else Calibration(prompts=held_out))
    calibration = base.model_copy(update={"prompts": held_out, "samples": 16, "seed": base.seed + 1000})
    return known.model_copy(
        update={"model": known.model.model_copy(update={"source": source}), "calibration": calibration}
    )


def demo_calibration() -> Calibration:
    """How the embedded model is drawn: the calibration section of its shipped recipe."""
    from svdq_cli.recipe import load_recipe
    from svdq_cli.resources import data_root

    calibration = load_recipe(data_root("configs") / "demo-int4.yaml").calibration
    assert calibration is not None
    return calibration


def evaluate(
    path: Path,
    recipe: Recipe,
    *,
    report_folder: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> EvalReport:
    """Pictures of the 16-bit model (the recipe's source), of naive 4-bit and of the checkpoint, at equal seeds.

    With `report_folder`: the pictures, a grid of them, the report and its plots are kept there.
    """
    if report_folder is None:
        return evaluate_pictures(path, recipe, options=options, observe=observe).report
    # Imports matplotlib, which takes a while
    from svdq_cli.plotting import plot_evaluation, search_of

    refuse_existing(report_folder, overwrite=options.overwrite)
    search = search_of(path)  # refuses a damaged report now, not after the long work
    found = evaluate_pictures(path, recipe, options=options, observe=observe)
    keep_report(report_folder, found.report, found.pictures)
    plot_evaluation(report_folder, found.layers, search=search)
    return found.report


def evaluate_pictures(
    path: Path, recipe: Recipe, *, options: RunOptions = DEFAULT_OPTIONS, observe: Observer = ignore_events
) -> Evaluation:
    """`evaluate`, with the pictures themselves and what was measured of the layers."""
    started = time.monotonic()
    checkpoint = open_checkpoint(path)
    source = source_of(recipe, options)
    if source.pipeline is None:
        raise InputError(
            f"{source.path}: evaluation draws pictures, and this is not a whole pipeline",
            hint="give the pipeline folder that the checkpoint was made from, or --base for the parts that are missing",
            where=str(source.path),
        )
    if source.config.get("_class_name") != checkpoint.source.config.get("_class_name"):
        raise InputError(
            f"{source.path} is a {source.config.get('_class_name')}, {path} a "
            f"{checkpoint.source.config.get('_class_name')}",
            hint="give the model that the checkpoint was made from",
        )
    prompts = chosen_prompts(recipe, options, observe)
    settings = draw_settings(recipe, source, beside=options.beside)
    device = resolve_device(options.device)

    pipe = load_16bit_pipeline(source, class_name=checkpoint.model_class, device=device)
    model: nn.Module = getattr(pipe, source.component)
    reference = draw(pipe, prompts, settings=settings, stage="draw 16-bit", observe=observe)
    floor = _noise_floor(pipe, prompts, settings, reference)
    layers = judge_layers(pipe, model, checkpoint, source, prompts[:SQNR_PROMPTS], settings, observe)
    _make_naive(model, checkpoint, source)
    naive = draw(pipe, prompts, settings=settings, stage="draw naive 4-bit", observe=observe)
    del pipe, model
    base = checkpoint.source.pipeline or source.pipeline  # a single file has no other components of its own
    quantized = load_pipeline(path, device=device, base=base)
    converted = draw(quantized, prompts, settings=settings, stage="draw converted", observe=observe)

    scores, baseline = compare(reference, converted), compare(reference, naive)
    report = EvalReport(
        images=len(prompts),
        psnr_db=scores.psnr,
        ssim=scores.ssim,
        lpips=None,
        clip=None,
        baselines={"rtn": BaselineFacts(baseline.psnr, baseline.ssim)},
        layer_sqnr_db=layers.sqnr,
        noise_floor_psnr_db=floor,
        seconds=time.monotonic() - started,
    )
    return Evaluation(_gated(report, recipe), Pictures(prompts, reference, naive, converted), layers)


def keep_report(folder: Path, report: EvalReport, pictures: Pictures) -> None:
    """The report, the grid and every picture as files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json_text(report) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(pictures.prompts) + "\n", encoding="utf-8")
    naive = report.baselines["rtn"].psnr_db.mean
    picture_grid(
        [
            ("16-bit", pictures.sixteen_bit[:GRID_ROWS]),
            (f"naive 4-bit\n{naive:.1f} dB", pictures.naive[:GRID_ROWS]),
            (f"SVDQuant\n{report.psnr_db.mean:.1f} dB", pictures.converted[:GRID_ROWS]),
        ],
        pictures.prompts[:GRID_ROWS],
    ).save(folder / "grid.png")
    for name, drawn in (
        ("16bit", pictures.sixteen_bit),
        ("naive", pictures.naive),
        ("converted", pictures.converted),
    ):
        (folder / name).mkdir(exist_ok=True)
        for index, picture in enumerate(drawn):
            picture.save(folder / name / f"{index:04d}.png")


def generate(
    path: Path,
    prompt: str,
    out: Path,
    *,
    recipe: Recipe,
    backend: str = "auto",
    width: int | None = None,
    height: int | None = None,
    base: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> GenerateReport:
    """One picture from a checkpoint, drawn as `recipe` says. `base`: see `load_pipeline`."""
    refuse_existing(out, overwrite=options.overwrite)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(
            f"{out}: unknown picture type", hint="name the output .png, .jpg or .webp", where=str(out)
        )
    started = time.monotonic()
    pipe = load_pipeline(path, device=resolve_device(options.device), backend=backend, base=base)
    source = open_checkpoint(path).source
    settings = draw_settings(recipe, replace(source, pipeline=base or source.pipeline))
    settings = replace(
        settings, width=width or settings.width, height=height or settings.height, batch_size=1
    )
    (picture,) = draw(pipe, [prompt], settings=settings, observe=observe)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    picture.save(partial)
    partial.replace(out)
    facts: Backend = pipe.svdq_backend  # type: ignore[attr-defined]
    return GenerateReport(
        path=str(out),
        backend=f"{facts.name}: {facts.reason}",
        seconds=time.monotonic() - started,
        width=picture.width,
        height=picture.height,
    )


def _noise_floor(
    pipe: DiffusionPipeline, prompts: Sequence[str], settings: DrawSettings, reference: Sequence[Image]
) -> float:
    """PSNR between two runs of the 16-bit model, 100 where it repeats itself exactly."""
    count = min(NOISE_PICTURES, len(prompts))
    again = draw(pipe, prompts[:count], settings=replace(settings, batch_size=1))
    return compare(list(reference[:count]), again).psnr.mean


def _make_naive(model: nn.Module, checkpoint: Checkpoint, source: Source) -> None:
    """Turn the 16-bit model into the baseline: the same layers, rounded to nearest, nothing else."""
    device = next(model.parameters()).device
    layers: dict[str, nn.Module] = {}
    for plan in checkpoint.layers:
        weight = read_tensor(source, f"{plan.name}.weight").flatten(1)
        bias = read_tensor(source, f"{plan.name}.bias") if plan.linear.bias else None
        if isinstance(plan, W4A4Plan):
            solution = naive_solution(plan, weight, bias, checkpoint.dtype)
        else:
            solution = solve_w4a16(
                plan, weight.float(), None if bias is None else bias.float(), dtype=checkpoint.dtype
            )
        layers[plan.name] = quantized_linear(solution).to(device)
    replace_linears(model, layers)


def _gated(report: EvalReport, recipe: Recipe) -> EvalReport:
    plain = to_json(report)
    figures = {gate: figure_of(gate, plain) for gate in recipe.gates}
    missed = tuple(
        f"{gate} (is {v:.4g})" for gate, v in figures.items() if v is not None and not gate.holds(v)
    )
    return replace(report, status="gate-missed", gates_missed=missed) if missed else report
