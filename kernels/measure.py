"""Everything that needs a GPU, in the order of kernels/README.md: `python kernels/measure.py STAGE... --out FOLDER`.

What each stage needs is looked up before the first one starts. Every stage writes its own JSON as soon as it is done,
so a run that is cut short keeps what it has. Run from a checkout: the tests are part of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What has to be importable and how pip calls it, and what has to be on the PATH. CuPy and NVRTC: `cuda_device` says
PACKAGES = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "psutil": "psutil"}
STAGE_PACKAGES = {
    "correctness": {"pytest": "pytest"},
    "sanitizer": {"pytest": "pytest"},
    "modes": {
        name: name
        for name in ("diffusers", "transformers", "accelerate", "safetensors", "pydantic", "torchmetrics")
    },
}
STAGE_PROGRAMS = {"sanitizer": "compute-sanitizer"}


def lacking(packages: Mapping[str, str]) -> str | None:
    """What to install, or None."""
    absent = [found for name, found in packages.items() if importlib.util.find_spec(name) is None]
    return f"pip install {' '.join(absent)}" if absent else None


def stage_lack(stage: str) -> str | None:
    """Why a stage can't run here, or None."""
    program = STAGE_PROGRAMS.get(stage)
    if program and shutil.which(program) is None:
        return f"{program} is not on the PATH; it is part of the CUDA toolkit"
    return lacking(STAGE_PACKAGES.get(stage, {}))


if install := lacking(PACKAGES):
    raise SystemExit(f"kernels/measure.py: {install}")

import torch  # noqa: E402

from svdq_cli.bench import probes  # noqa: E402
from svdq_cli.bench.cases import BenchSettings  # noqa: E402
from svdq_cli.bench.device import device_facts  # noqa: E402
from svdq_cli.bench.goals import GoalRow, layer_goals, step_goals  # noqa: E402
from svdq_cli.bench.plot import draw_plot  # noqa: E402
from svdq_cli.bench.report import BenchReport, StepRow  # noqa: E402
from svdq_cli.bench.run import bench_shapes, precisions_named  # noqa: E402
from svdq_cli.bench.shapes import FLUX1_DEV, PIXART_SIGMA, SDXL, ShapeSet  # noqa: E402
from svdq_cli.bench.step import (  # noqa: E402
    Arithmetic,
    StepSettings,
    arithmetics,
    random_w4a4,
    step_rows,
)
from svdq_cli.bench.transformer import FLUX1_DEV_STEP  # noqa: E402
from svdq_cli.errors import EnvironmentLacksError  # noqa: E402
from svdq_cli.experimental.hopper.choice import (  # noqa: E402
    FILE_NAME,
    PORTABLE,
    ModeMeasurement,
    choose_hopper_mode,
)
from svdq_cli.experimental.hopper.modes import HopperMode  # noqa: E402
from svdq_cli.experimental.hopper.selftest import kernel_cases  # noqa: E402
from svdq_cli.gpu import architectures  # noqa: E402
from svdq_cli.gpu.launch import cuda_device  # noqa: E402
from svdq_cli.records import Int4, ignore_events  # noqa: E402
from svdq_cli.reports import to_json  # noqa: E402
from svdq_cli.runtime.fused import FusedW4A4Linear  # noqa: E402

GPU = torch.device("cuda", 0)
RANK = 32
TESTS = (
    "tests/gpu/test_on_device.py",
    "tests/experimental/hopper/test_on_device.py",
    "-q",
    "-p",
    "no:cacheprovider",
)
# What pictures of a mode are drawn with and compared by, where diffusers is installed
IMAGES = 8


def self_test(out: Path) -> Iterator[dict[str, object]]:
    """Every kernel against its reference. Nothing else is worth running where this fails."""
    gpu = cuda_device(GPU)
    for case in kernel_cases(torch.bfloat16, gpu.architecture):
        found = case.disagreement(gpu, GPU)
        yield {
            **{"op": case.op, "precision": case.precision, "mode": case.mode},
            **{"disagreement": found, "ok": found <= case.most},
        }


def correctness(out: Path) -> Iterator[dict[str, object]]:
    """All shapes, 1,000 launches, CUDA graphs, streams."""
    yield _run([sys.executable, "-m", "pytest", *TESTS])


def sanitizer(out: Path) -> Iterator[dict[str, object]]:
    """compute-sanitizer over the self-tests and a few awkward shapes."""
    chosen = "test_self_test or (reference and (m129 or m7-) and (r32 or r80 or r64))"
    if "-k" in TESTS:  # the last -k counts
        chosen = f"({chosen}) and {TESTS[-1]}"
    for tool in ("memcheck", "racecheck"):
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        yield {"tool": tool, **_run([*words, sys.executable, "-m", "pytest", *TESTS, "-k", chosen])}


def overhead(out: Path) -> Iterator[dict[str, object]]:
    """Microseconds of the CPU for one call of a kernel, and of a whole layer, with the GPU far behind."""
    layer = FusedW4A4Linear(random_w4a4(3072, 3072, RANK, Int4(), GPU))
    x = torch.randn(64, 3072, device=GPU, dtype=torch.bfloat16)
    quantized = layer.quantize(x)
    calls: dict[str, Callable[[], object]] = {
        "quantize_down": lambda: layer.quantize(x),
        "w4a4_gemm": lambda: layer.multiply(quantized, 64),
        "layer": lambda: layer(x),
        "torch bfloat16 linear": _bf16_call(x),
    }
    for name, call in calls.items():
        yield {"call": name, "us": _host_us(call)}


def _bf16_call(x: torch.Tensor) -> Callable[[], object]:
    weight = torch.randn(3072, 3072, device=GPU, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, weight)


def _host_us(call: Callable[[], object], count: int = 200) -> float:
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    us = (time.perf_counter() - started) / count * 1e6
    torch.cuda.synchronize()
    return us


def speed(out: Path) -> Iterator[dict[str, object]]:
    """FLUX.1-dev's shapes, all modes, all baselines, and which goals were met."""
    report = _bench(FLUX1_DEV, out)
    _show_goals(layer_goals(report.rows))
    yield to_json(report)


def more_shapes(out: Path) -> Iterator[dict[str, object]]:
    """SDXL's and PixArt-Sigma's shapes."""
    for shapes in (SDXL, PIXART_SIGMA):
        yield to_json(_bench(shapes, out))


def _bench(shapes: ShapeSet, out: Path) -> BenchReport:
    report = bench_shapes(shapes, precisions=precisions_named(None), rank=RANK, settings=BenchSettings(GPU))
    draw_plot(report, out / f"{shapes.name}.png")
    for row in report.rows:
        rank = "" if row.rank is None else f" R {row.rank}"
        print(
            f"  {row.layer:22} {row.op:18} {row.mode:22} {row.precision:10}{rank:6} {row.us.median:9.1f} us "
            f"{row.tflops:7.1f} T  x{row.ratio:.2f}  error {row.relative_error:.1e}"
            + (f"  floor {row.floor_us:.1f} us" if row.floor_us else ""),
            flush=True,
        )
    print("\n".join(f"  {note}" for note in report.notes))
    return report


def _show_goals(goals: Iterator[GoalRow]) -> None:
    for goal in goals:
        word = "met" if goal.met else "MISSED"
        print(f"  {word:6} {goal.found:6.2f} {goal.wanted:8} {goal.layer:22} {goal.goal}", flush=True)


def step(out: Path) -> Iterator[dict[str, object]]:
    """A whole step of a FLUX.1-dev-shaped transformer: bfloat16, int4 in every mode, nvfp4."""
    yield from _steps(StepSettings(FLUX1_DEV_STEP, GPU, RANK), arithmetics(precisions_named(None), GPU))


def compiled_step(out: Path) -> Iterator[dict[str, object]]:
    """The same under torch.compile too: bfloat16, and int4 in Hopper's 4-bit modes (elsewhere the portable kernels)."""
    modes = [Arithmetic(Int4(), mode) for mode in (HopperMode.EXACT, HopperMode.W4A8)]
    chosen = modes if cuda_device(GPU).architecture.hopper_modes else [Arithmetic(Int4())]
    yield from _steps(StepSettings(FLUX1_DEV_STEP, GPU, RANK, compiled=True), (Arithmetic(), *chosen))


def _steps(settings: StepSettings, models: Sequence[Arithmetic]) -> Iterator[dict[str, object]]:
    rows: list[StepRow] = []
    for row in step_rows(settings, models):
        rows.append(row)
        yield to_json(row)
    _show_goals(step_goals(rows))


def modes(out: Path) -> Iterator[dict[str, object]]:
    """Which of Hopper's modes is the default: times of the stage `step`, images of the embedded model (needs
    diffusers and transformers). Writes FOLDER/measured_sm_90a.json, which takes effect in kernels/."""
    steps = json.loads((out / "step.json").read_text(encoding="utf-8"))["results"]
    us = {row["precision"]: row["us"]["median"] for row in steps if row["mode"] == "CUDA graph"}
    psnr = _psnr_to_exact(out)
    found = [
        ModeMeasurement(label, us[name], psnr[label])
        for label, name in (
            (PORTABLE, "int4"),
            *((mode.label, f"int4 hopper {mode.label}") for mode in HopperMode),
        )
    ]
    measured = {"device": to_json(device_facts(GPU)), "modes": [to_json(item) for item in found]}
    (out / FILE_NAME).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    yield {**measured, "choice": choose_hopper_mode(found).reason}


def _psnr_to_exact(out: Path) -> dict[str, float]:
    """Mean PSNR of the embedded model's images in each mode against mode EXACT's."""
    from svdq_cli.checkpoint.reader import open_checkpoint
    from svdq_cli.conversion.convert import convert
    from svdq_cli.evaluation.images import compare
    from svdq_cli.inference.load import load_pipeline
    from svdq_cli.pipelines.generate import generate_images
    from svdq_cli.prepare.defaults import evaluation_recipe
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.prepare.prompts import chosen_prompts
    from svdq_cli.prepare.sampling import sampling_for, with_model_sampling
    from svdq_cli.recipe import Calibration, default_recipe

    folder, options = out / "embedded-int4", RunOptions(device="cuda", overwrite=True)
    convert(default_recipe("demo", calibration=Calibration()), folder, options=options)
    checkpoint = open_checkpoint(folder)
    recipe = with_model_sampling(evaluation_recipe(checkpoint, "demo"), checkpoint.source, held_out=True)
    prompts = chosen_prompts(recipe, options, ignore_events).texts[:IMAGES]
    settings = sampling_for(recipe, checkpoint.source).settings

    def images(backend: str):
        return generate_images(load_pipeline(folder, device=GPU, backend=backend), prompts, settings=settings)

    exact = images("kernels:exact")
    drawn = {mode.label: images(f"kernels:{mode.label}") for mode in HopperMode}
    drawn[PORTABLE] = images("kernels")  # before a measurement is in place these are the portable ones
    return {label: compare(exact, others).psnr.mean for label, others in drawn.items()}


def probe(out: Path) -> Iterator[dict[str, object]]:
    """What the Hopper kernels' design rests on: exactness of e4m3 sums, rates, the cost of rescaling."""
    gpu = cuda_device(GPU)
    yield from probes.exactness(gpu)
    yield from probes.wavefronts(gpu)
    yield from probes.rates(gpu)


STAGES = {
    stage.__name__: stage
    for stage in (
        *(self_test, correctness, probe, speed, overhead, step, modes, sanitizer, compiled_step),
        more_shapes,
    )
}


def leave_hopper_out() -> None:
    """A kernel of Hopper's own that fails takes the process's CUDA context with it: the others are measured without."""
    global TESTS
    kinds = (replace(kind, hopper_modes=False) for kind in architectures.ARCHITECTURES)
    architectures.ARCHITECTURES = tuple(kinds)
    TESTS = (*(word for word in TESTS if "hopper" not in word), "-k", "not hopper")


def _run(words: list[str]) -> dict[str, object]:
    environment = {**os.environ, "SVDQ_REQUIRE_GPU": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    tail = (done.stdout + done.stderr)[-3000:]
    print(tail, flush=True)
    return {"command": " ".join(words), "exit_code": done.returncode, "tail": tail}


def run_stage(name: str, out: Path) -> tuple[bool, list[dict[str, object]]]:
    """Prints and writes what a stage finds. Returns whether it ran to its end, and its results."""
    started = time.monotonic()
    print(f"== {name}: {(STAGES[name].__doc__ or '').strip()}", flush=True)
    results: list[dict[str, object]] = []
    problem = None
    try:
        for result in STAGES[name](out):
            results.append(result)
            if "rows" not in result:
                print(f"  {json.dumps(result)[:400]}", flush=True)
    except Exception:  # the next stage may still have something to say
        problem = traceback.format_exc()
        print(problem, flush=True)
    seconds = time.monotonic() - started
    found = {
        **{"stage": name, "seconds": seconds, "device": to_json(device_facts(GPU))},
        **{"results": results, "problem": problem},
    }
    (out / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"== {name}: {seconds:.0f} s", flush=True)
    return problem is None, results


def chosen_stages(asked: Sequence[str]) -> list[str]:
    """The stages to run. SystemExit for one that was asked for and can't run; of "all" such a one is left out."""
    chosen: list[str] = []
    for name in STAGES if "all" in asked else asked:
        if (lack := stage_lack(name)) is None:
            chosen.append(name)
        elif "all" in asked:
            print(f"== {name}: left out: {lack}", flush=True)
        else:
            raise SystemExit(f"{name}: {lack}")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=(*STAGES, "all"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--portable", action="store_true", help="leave Hopper's own kernels out")
    asked = parser.parse_args()
    stages = chosen_stages(asked.stages)
    if asked.portable:
        leave_hopper_out()
    try:
        cuda_device(GPU)
    except EnvironmentLacksError as lack:
        print(f"{lack.message}. {lack.hint or ''}", file=sys.stderr)
        return lack.code
    asked.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in stages:
        ended, results = run_stage(name, asked.out)
        failed = failed or not ended or any(result.get("exit_code") for result in results)
        if name == "self_test" and not (ended and all(result["ok"] for result in results)):
            print(
                "the self-test failed: stopping here; --portable leaves Hopper's own kernels out", flush=True
            )
            return 1
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
