"""`make bench-quality`: what every step of the search is worth, on the embedded model and its stress variant.

    python -m tools.bench_quality --sources demo --precisions int4 --prompts 32 --only paper balanced best

Calibration prompts and judging prompts are apart. The paper's method (smoothing grid with the branch in the loop, SVD,
rounding to nearest) is solved and judged in the same run as everything that is compared with it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO, get_args

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor

from svdq_cli.calibration.collect import collect_stats
from svdq_cli.conversion.allocation import (
    allocate_ranks,
)
from svdq_cli.conversion.fit_outputs import with_outputs_fitted
from svdq_cli.conversion.kept_tokens import tokens_for_covariances
from svdq_cli.conversion.move_means import with_means_moved
from svdq_cli.conversion.needs import needs_of
from svdq_cli.conversion.provenance import contents_before
from svdq_cli.conversion.read_weights import finite_tensor
from svdq_cli.conversion.solve_layers import Statistics, load_solved, solve_into
from svdq_cli.conversion.tune_model import tune_denoisers
from svdq_cli.conversion.work_folder import SolvedLayers, WorkFolder
from svdq_cli.evaluation.images import psnr_db
from svdq_cli.evaluation.layer_sqnr import moved_of
from svdq_cli.evaluation.layers import layer_sqnr_db
from svdq_cli.evaluation.outputs import OutputCall, output_errors, record_outputs
from svdq_cli.inference.load import load_16bit_pipeline, replace_layers
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.joint import joint_model
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.locate import DEMO_SOURCES
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared, prepare
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, default_recipe, output_of, with_overrides
from svdq_cli.recipe.schema import STEPS_OF_EFFORT
from svdq_cli.records import ActivationStats, Event, LayerSolution, SearchStep, W4A4Solution, following_seed
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.source.means import means_by_layer
from svdq_cli.system.machine import resolve_device

ALL_STEPS: tuple[SearchStep, ...] = get_args(SearchStep)
NORMAL_95 = 1.96  # standard deviations
SQNR_PROMPTS = 16  # of the judging prompts, for activations that no step has seen
JUDGE_SEED = 1000


def _without(*steps: SearchStep) -> tuple[SearchStep, ...]:
    """The usual steps of `balanced` but for some."""
    return tuple(step for step in STEPS_OF_EFFORT["balanced"] if step not in steps)


VARIANTS: dict[str, dict[str, object]] = {
    "data-free": {"effort": "datafree"},
    "paper": {"effort": "fast", "search": ()},
    "fast": {"effort": "fast"},
    "paper + gptq": {"effort": "fast", "search": ("gptq",)},
    "paper + gptq + scales": {"effort": "fast", "search": ("gptq", "scales")},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
    "balanced + means": {"effort": "balanced", "search": ALL_STEPS},
    "balanced - learned": {"effort": "balanced", "search": _without("learned")},
    "balanced - refine": {"effort": "balanced", "search": _without("refine")},
    "balanced - gptq": {"effort": "balanced", "search": _without("gptq", "scales")},
    "balanced - scales": {"effort": "balanced", "search": _without("scales")},
    "balanced - refit": {"effort": "balanced", "search": _without("refit")},
    "balanced - output": {"effort": "balanced", "search": _without("output")},
    "best - output": {"effort": "best", "search": _without("output")},
    "best + means": {"effort": "best", "search": ALL_STEPS},
    "balanced, rank 32": {"effort": "balanced", "rank": 32},
    "balanced, rank auto, same bytes": {"effort": "balanced", "rank": "auto"},
}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """How a set of solutions does on what no step of the search has seen, in dB: the mean over W4A4 layers of their
    output's SQNR, and for every prompt the SQNR of the model's output on the 16-bit trajectory's own inputs, of one
    step and of the sum over the steps, and the picture's PSNR (nothing where none were asked for)."""

    layer_sqnr_db: float
    step_db: Tensor
    sum_db: Tensor
    psnr_db: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """`seconds` of the solve, wall clock."""

    variant: str
    scores: Scores
    seconds: float


def interval(differences: Tensor) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) of paired differences, one a prompt."""
    spread = differences.std().item() if len(differences) > 1 else math.nan
    return differences.mean().item(), NORMAL_95 * spread / math.sqrt(len(differences))


class Judge:
    """The 16-bit model's outputs and pictures of one source, its held-out activations, and how solutions are scored on
    them."""

    def __init__(self, prepared: Prepared, prompts: int, images: int, options: RunOptions) -> None:
        self.prepared, self.device = prepared, resolve_device(options.device)
        calibration = prepared.recipe.calibration
        assert calibration is not None
        held_out = calibration.model_copy(
            update={
                "prompts": "calib_prompts/demo_eval.txt",
                "samples": max(prompts, images),
                "seed": JUDGE_SEED,
            }
        )
        recipe = prepared.recipe.model_copy(update={"calibration": held_out})
        texts = chosen_prompts(recipe, options, _quiet).texts
        self.imaged = texts[:images]
        self.settings: SamplingSettings = sampling_for(recipe, prepared.source).settings
        pipe = self._pipeline()
        self.reference: Sequence[Image] = (
            generate_images(pipe, self.imaged, settings=self.settings) if images else ()
        )
        self.calls: list[list[OutputCall]] = [
            record_outputs(
                pipe,
                prepared.source.components,
                [text],
                replace(self.settings, seed=following_seed(self.settings.seed, index)),
                _quiet,
            )
            for index, text in enumerate(texts[:prompts])
        ]
        self.stats: Mapping[str, ActivationStats] = collect_stats(
            pipe,
            joint_model(pipe, prepared.source.components),
            prepared.plan.inputs,
            texts[:SQNR_PROMPTS],
            sampling=self.settings,
            rows=2048,
        )

    def _pipeline(self) -> DiffusionPipeline:
        return load_16bit_pipeline(
            self.prepared.source, class_name=self.prepared.plan.model_class, device=self.device
        )

    def score(self, solved: Prepared, solutions: Mapping[str, LayerSolution]) -> Scores:
        """`solved`: the model whose layers these are, with the biases that it has by now."""
        pipe = load_16bit_pipeline(solved.source, class_name=solved.plan.model_class, device=self.device)
        layers = {name: quantized_linear(solution) for name, solution in solutions.items()}
        replace_layers(pipe, solved.source.components, layers)
        models = {name: getattr(pipe, name) for name in solved.source.components}
        found = [output_errors(models, calls, self.device, steps=self.settings.steps) for calls in self.calls]
        sqnr = [errors.sqnr for errors in found if errors is not None]
        drawn = generate_images(pipe, self.imaged, settings=self.settings) if self.imaged else ()
        psnr = [psnr_db(a, b) for a, b in zip(self.reference, drawn, strict=True)]
        return Scores(
            self._layers(solved, solutions),
            torch.tensor([each.step for each in sqnr]),
            torch.tensor([each.sum for each in sqnr]),
            torch.tensor(psnr),
        )

    def _layers(self, solved: Prepared, solutions: Mapping[str, LayerSolution]) -> float:
        source = self.prepared.source
        widths = {linear.name: linear.in_features for linear in self.prepared.inventory.linears}
        means = means_by_layer(solved.source.moved, widths)
        figures = [
            layer_sqnr_db(
                finite_tensor(source, f"{name}.weight").flatten(1),
                finite_tensor(source, f"{name}.bias") if solution.plan.linear.bias else None,
                solution,
                self.stats[shared.name].rows,
                moved=moved_of(solved.source, means, name) if solved.source.moved else None,
            )
            for shared in self.prepared.plan.inputs
            for name in shared.layers
            if isinstance(solution := solutions[name], W4A4Solution)
        ]
        return sum(figures) / len(figures)


def measure(
    source: str,
    precision: str,
    *,
    prompts: int,
    images: int,
    variants: Sequence[str],
    options: RunOptions = DEFAULT_OPTIONS,
    report: Callable[[Row], None],
) -> None:
    """Solve and judge every variant of one source at one precision."""
    recipe = default_recipe(source, calibration=Calibration())
    recipe = with_overrides(recipe, {"quantization.precision": precision, "quantization.rank": 16})
    judge = Judge(prepare(recipe), prompts, images, options)
    drawn = _calibrated(judge.prepared, options)
    for name in variants:
        wanted = recipe.quantization.model_copy(update=VARIANTS[name])
        # the layers of a file in most formats have one rank, which nothing is left to choose of
        outputs = (output_of("comfy", None),) if wanted.rank == "auto" else ()
        prepared = prepare(recipe.model_copy(update={"quantization": wanted, "outputs": outputs}))
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            solved, solutions = _solved(prepared, drawn, WorkFolder(Path(folder)), judge.device, options)
            seconds = time.monotonic() - started
            report(Row(name, judge.score(solved, solutions), seconds))


def _solved(
    prepared: Prepared, drawn: Statistics, work: WorkFolder, device: torch.device, options: RunOptions
) -> tuple[Prepared, SolvedLayers]:
    needs = needs_of(prepared, None)
    statistics = None if needs.data_free else drawn
    prepared, statistics = with_means_moved(prepared, statistics)
    prepared, _ = allocate_ranks(
        prepared,
        statistics,
        needs.gains,
        device,
        _quiet,
        contents=lambda: contents_before(prepared, options),
        options=options,
        work=work,
    )
    solve_into(work, prepared, statistics, device, _quiet)
    solved, reports = load_solved(prepared.plan, work, data_free=needs.data_free)
    if needs.tuning and statistics is not None:
        solved, _, _ = tune_denoisers(
            prepared,
            needs.tuning,
            statistics,
            solved,
            reports,
            options=options,
            device=device,
            observe=_quiet,
        )
    if needs.output:
        prepared, _ = with_outputs_fitted(
            prepared, needs.output, solved, options=options, device=device, observe=_quiet
        )
    return prepared, solved


def _calibrated(prepared: Prepared, options: RunOptions) -> Statistics:
    device = resolve_device(options.device)
    pipe = load_16bit_pipeline(prepared.source, class_name=prepared.plan.model_class, device=device)
    sampling = sampling_for(prepared.recipe, prepared.source)
    tokens = tokens_for_covariances(prepared, rows=sampling.rows, budget=sampling.size_bytes)
    stats = collect_stats(
        pipe,
        joint_model(pipe, prepared.source.components),
        prepared.plan.inputs,
        chosen_prompts(prepared.recipe, options, _quiet).texts,
        sampling=sampling.settings,
        rows=sampling.rows,
        covariance_tokens={
            shared.name: count for shared, count in zip(prepared.plan.inputs, tokens, strict=True)
        },
    )
    return Statistics("", stats)


def _quiet(event: Event) -> None:
    """Progress is the table itself."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sources", nargs="+", default=DEMO_SOURCES, choices=DEMO_SOURCES)
    parser.add_argument("--precisions", nargs="+", default=("int4", "nvfp4"), choices=("int4", "nvfp4"))
    parser.add_argument("--prompts", type=int, default=32, help="whose trajectories judge the model's output")
    parser.add_argument("--images", type=int, default=0, help="images of each variant, for PSNR")
    parser.add_argument("--only", nargs="+", default=tuple(VARIANTS), choices=tuple(VARIANTS))
    wanted = parser.parse_args()
    torch.manual_seed(0)
    for source in wanted.sources:
        for precision in wanted.precisions:
            print(
                f"\n{source}, {precision}: {wanted.prompts} held-out prompts; differences to {wanted.only[0]}"
            )
            table = Table(sys.stdout)
            measure(
                source,
                precision,
                prompts=wanted.prompts,
                images=wanted.images,
                variants=wanted.only,
                report=table.add,
            )


class Table:
    """Rows as they come, each with its paired differences to the first and their 95 % intervals."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.first = out, None
        print(
            f"{'search':34} {'layers':>6}  {'one step':>21}  {'sum over steps':>21}  {'PSNR':>21}  {'s':>6}",
            file=out,
        )

    def add(self, row: Row) -> None:
        """Print one more."""
        self.first = self.first or row.scores
        columns = [
            _figure(now, before)
            for now, before in (
                (row.scores.step_db, self.first.step_db),
                (row.scores.sum_db, self.first.sum_db),
                (row.scores.psnr_db, self.first.psnr_db),
            )
        ]
        layers = f"{row.scores.layer_sqnr_db:6.2f}"
        print(
            f"{row.variant:34} {layers}  {'  '.join(columns)}  {row.seconds:6.1f}", file=self.out, flush=True
        )


def _figure(now: Tensor, first: Tensor) -> str:
    if not len(now):
        return f"{'':>21}"
    mean, half = interval(now - first)
    return f"{now.mean().item():6.2f} ({mean:+5.2f} ± {half:4.2f})"


if __name__ == "__main__":
    main()
