"""`make bench-quality`: what every step of the search is worth, on the embedded model and its stress variant.

    python -m svdq_cli.quality --sources demo --precisions int4 --prompts 64 --only paper balanced best

Calibration prompts and judging prompts are apart. The paper's method (smoothing grid with the branch in the loop, SVD,
rounding to nearest) is solved and judged in the same run as everything that is compared with it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from svdq_cli.calibrate.collect import collect_stats
from svdq_cli.calibrate.joint import joint_model
from svdq_cli.calibrate.pipelines import draw
from svdq_cli.calibrate.settings import DrawSettings
from svdq_cli.conversion.allocation import RANKS, budget_of, candidates_of, choices_of, layer_gains, plan_with
from svdq_cli.conversion.reconstructing import reconstructed
from svdq_cli.conversion.solving import Statistics, solve_into, solved_layers
from svdq_cli.conversion.weights import finite_tensor
from svdq_cli.evaluate.images import compare
from svdq_cli.evaluate.layers import layer_sqnr_db
from svdq_cli.journal import SolvedLayers, WorkFolder
from svdq_cli.loading import load_16bit_pipeline, replace_layers
from svdq_cli.locate import DEMO_SOURCES
from svdq_cli.machine import resolve_device
from svdq_cli.preparing import DEFAULT_OPTIONS, Prepared, RunOptions, chosen_prompts, prepare, sampling_for
from svdq_cli.recipe import DEFAULT_RANK, Calibration, default_recipe, with_overrides
from svdq_cli.records import ActivationStats, Event, LayerSolution, W4A4Solution
from svdq_cli.runtime.linear import quantized_linear

SQNR_PROMPTS = 16  # of the judging prompts, for activations that no step has seen
JUDGE_SEED = 1000

VARIANTS: dict[str, dict[str, object]] = {
    "paper": {"effort": "fast"},
    "paper + gptq": {"effort": "fast", "search": ("gptq",)},
    "paper + gptq + scales": {"effort": "fast", "search": ("gptq", "scales")},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
    "balanced - learned": {"effort": "balanced", "search": ("gptq", "scales", "refit")},
    "balanced - gptq": {"effort": "balanced", "search": ("learned", "refit")},
    "balanced - scales": {"effort": "balanced", "search": ("learned", "gptq", "refit")},
    "balanced - refit": {"effort": "balanced", "search": ("learned", "gptq", "scales")},
    "balanced, rank 32": {"effort": "balanced", "rank": 32},
    "balanced, rank auto, same bytes": {"effort": "balanced", "rank": "auto"},
}


@dataclass(frozen=True, slots=True)
class Row:
    """`layer_sqnr_db` over W4A4 layers only, on held-out activations; `seconds` of the solve, wall clock."""

    variant: str
    layer_sqnr_db: float
    psnr_db: float
    seconds: float


class Judge:
    """The 16-bit pictures of one source, its held-out activations, and how a set of solutions is scored on them."""

    def __init__(self, prepared: Prepared, prompts: int, options: RunOptions) -> None:
        self.prepared, self.device = prepared, resolve_device(options.device)
        calibration = prepared.recipe.calibration
        assert calibration is not None
        held_out = calibration.model_copy(
            update={"prompts": "calib_prompts/demo_eval.txt", "samples": prompts, "seed": JUDGE_SEED}
        )
        recipe = prepared.recipe.model_copy(update={"calibration": held_out})
        self.prompts = chosen_prompts(recipe, options, _quiet).texts
        self.settings: DrawSettings = sampling_for(recipe, prepared.source).settings
        pipe = self._pipeline()
        self.reference: Sequence[Image] = draw(pipe, self.prompts, settings=self.settings)
        self.stats: Mapping[str, ActivationStats] = collect_stats(
            pipe,
            joint_model(pipe, prepared.source.components),
            prepared.plan.inputs,
            self.prompts[:SQNR_PROMPTS],
            draw=self.settings,
            rows=2048,
        )

    def _pipeline(self) -> DiffusionPipeline:
        return load_16bit_pipeline(
            self.prepared.source, class_name=self.prepared.plan.model_class, device=self.device
        )

    def score(self, solutions: Mapping[str, LayerSolution]) -> tuple[float, float]:
        """(mean layer SQNR of the W4A4 layers, mean PSNR of the pictures), both in dB."""
        pipe = self._pipeline()
        layers = {name: quantized_linear(solution) for name, solution in solutions.items()}
        replace_layers(pipe, self.prepared.source.components, layers)
        psnr = compare(self.reference, draw(pipe, self.prompts, settings=self.settings)).psnr.mean
        figures = [
            layer_sqnr_db(
                finite_tensor(self.prepared.source, f"{name}.weight").flatten(1),
                finite_tensor(self.prepared.source, f"{name}.bias") if solution.plan.linear.bias else None,
                solution,
                self.stats[shared.name].rows,
            )
            for shared in self.prepared.plan.inputs
            for name in shared.layers
            if isinstance(solution := solutions[name], W4A4Solution)
        ]
        return sum(figures) / len(figures), psnr


def measure(
    source: str,
    precision: str,
    *,
    prompts: int,
    variants: Sequence[str],
    options: RunOptions = DEFAULT_OPTIONS,
    report: Callable[[Row], None],
) -> None:
    """Solve and judge every variant of one source at one precision."""
    recipe = default_recipe(source, calibration=Calibration())
    recipe = with_overrides(recipe, precision=precision, rank=16)
    judge = Judge(prepare(recipe), prompts, options)
    drawn = _calibrated(judge.prepared, options)
    for name in variants:
        wanted = recipe.quantization.model_copy(update=VARIANTS[name])
        prepared = prepare(recipe.model_copy(update={"quantization": wanted}))
        if wanted.rank == "auto":
            gains = layer_gains(prepared, options, judge.device, _quiet)
            candidates = candidates_of(prepared, drawn, RANKS, judge.device, _quiet, gains)
            chosen = choices_of(candidates, budget_of(prepared, candidates), rival=DEFAULT_RANK)
            prepared = replace(prepared, plan=plan_with(prepared.plan, candidates, chosen))
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            solutions = _solved(prepared, drawn, WorkFolder(Path(folder)), judge.device, options)
            seconds = time.monotonic() - started
            report(Row(name, *judge.score(solutions), seconds))


def _solved(
    prepared: Prepared, drawn: Statistics, work: WorkFolder, device: torch.device, options: RunOptions
) -> SolvedLayers:
    solve_into(work, prepared, drawn, device, _quiet)
    solved, reports = solved_layers(prepared.plan, work, data_free=False)
    if prepared.recipe.quantization.effort == "best":
        solved, _, _ = reconstructed(
            prepared, drawn, solved, reports, options=options, device=device, observe=_quiet
        )
    return solved


def _calibrated(prepared: Prepared, options: RunOptions) -> Statistics:
    device = resolve_device(options.device)
    pipe = load_16bit_pipeline(prepared.source, class_name=prepared.plan.model_class, device=device)
    assert prepared.sampling is not None
    stats = collect_stats(
        pipe,
        joint_model(pipe, prepared.source.components),
        prepared.plan.inputs,
        chosen_prompts(prepared.recipe, options, _quiet).texts,
        draw=prepared.sampling.settings,
        rows=prepared.sampling.rows,
    )
    return Statistics("", stats)


def _quiet(event: Event) -> None:
    """Progress is the table itself."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m svdq_cli.quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sources", nargs="+", default=DEMO_SOURCES, choices=DEMO_SOURCES)
    parser.add_argument("--precisions", nargs="+", default=("int4", "nvfp4"), choices=("int4", "nvfp4"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=tuple(VARIANTS), choices=tuple(VARIANTS))
    wanted = parser.parse_args()
    torch.manual_seed(0)
    for source in wanted.sources:
        for precision in wanted.precisions:
            print(f"\n{source}, {precision}: {wanted.prompts} pictures of held-out prompts, equal seeds")
            print(f"{'search':34} {'layer SQNR':>10} {'PSNR':>8} {'seconds':>8}", flush=True)
            measure(
                source,
                precision,
                prompts=wanted.prompts,
                variants=wanted.only,
                report=lambda row: print(
                    f"{row.variant:34} {row.layer_sqnr_db:7.2f} dB {row.psnr_db:5.2f} dB {row.seconds:8.1f}",
                    flush=True,
                ),
            )


if __name__ == "__main__":
    main()
