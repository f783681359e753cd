"""Everything that needs a GPU, in the order of kernels/README.md: `python kernels/measure.py [STAGE...] --out FOLDER`.

What each stage needs is looked up before the first one starts. Each stage runs in a process of its own, and after a
fault or a hang a new one goes on with the next item (svdq_cli/bench/supervise.py). Each figure is in
FOLDER/measured.jsonl as soon as it is there. Run from a checkout: the tests are part of it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

STARTED = time.monotonic()
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


def install_wheels(folder: Path) -> None:
    """What the machine lacks and its network does not give: the wheels of a folder, for the processes of this run.
    What it has stays as it is. SystemExit for a folder without wheels, or with one that pip refuses."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels {folder}: no wheels are there")
    wanted = [wheel for wheel in wheels if not _is_installed(wheel.name.partition("-")[0])]
    target = tempfile.mkdtemp(prefix="svdq-wheels-")
    if wanted:
        words = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--target",
            target,
        ]
        done = subprocess.run([*words, *map(str, wanted)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"--wheels {folder}: {done.stderr.strip()}")
    names = ", ".join(wheel.name for wheel in wanted) or "none: all are installed already"
    print(f"== wheels for this run: {names}", flush=True)
    paths = [target, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.path.append(target)
    importlib.invalidate_caches()


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":  # before anything is looked for: a wheel may be what is lacking
    _early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _early.add_argument("--wheels", type=Path)
    if _wheels := _early.parse_known_args()[0].wheels:
        install_wheels(_wheels)

if install := lacking(PACKAGES):
    raise SystemExit(f"kernels/measure.py: {install}")

import torch  # noqa: E402

from svdq_cli.bench import probes  # noqa: E402
from svdq_cli.bench.block_sizes import block_sizes, time_blocks  # noqa: E402
from svdq_cli.bench.cases import BenchSettings  # noqa: E402
from svdq_cli.bench.device import clocks, device_facts  # noqa: E402
from svdq_cli.bench.goals import layer_goals, step_goals  # noqa: E402
from svdq_cli.bench.plot import draw_plot  # noqa: E402
from svdq_cli.bench.report import BenchDevice, BenchReport, BenchRow, Microseconds, StepRow  # noqa: E402
from svdq_cli.bench.run import precisions_named, row_calls  # noqa: E402
from svdq_cli.bench.shapes import FLUX1_DEV, PIXART_SIGMA, SDXL, LinearShape  # noqa: E402
from svdq_cli.bench.step import (  # noqa: E402
    Arithmetic,
    StepSettings,
    arithmetics,
    random_w4a4,
    step_rows,
)
from svdq_cli.bench.supervise import Found, Item, Record, Stage, found_lines, serve, supervise  # noqa: E402
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
from svdq_cli.gpu.launch import CudaDevice, cuda_device  # noqa: E402
from svdq_cli.records import Int4, NvFp4, Precision, ignore_events  # noqa: E402
from svdq_cli.reports import to_json  # noqa: E402
from svdq_cli.runtime.fused import FusedW4A4Linear  # noqa: E402
from svdq_cli.runtime.large_blocks import has_large_blocks, prove_large_blocks  # noqa: E402
from svdq_cli.runtime.selftest import KernelCase  # noqa: E402

GPU = torch.device("cuda", 0)
RANK = 32
TESTS = {
    "portable": "tests/gpu/test_on_device.py",
    "hopper": "tests/experimental/hopper/test_on_device.py",
}
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
RECORD, PLOT = "measured.jsonl", "measured.png"
CLOCKS = "clocks"  # beside a figure: how the GPU ran right after it
BUDGET = 520.0  # seconds: what is lent ten minutes at a time
# What pictures of a mode are drawn with and compared by, where diffusers is installed
IMAGES = 8


# ------------------------------------------------------------------------------------------ stages and their items


def probe(out: Path) -> Iterator[Item]:
    """What the Hopper kernels' design rests on: exactness of e4m3 sums, bytes from L2, rates, the cost of rescaling."""
    gpu = cuda_device(GPU)
    if gpu.architecture.hopper_modes:
        yield "e4m3 sums", lambda: probes.exactness(gpu)
        yield "L2 bandwidth", lambda: probes.l2_bandwidth(gpu)
        yield "wavefronts", lambda: probes.wavefronts(gpu)
        yield "rates", lambda: probes.rates(gpu)


def largest(out: Path) -> Iterator[Item]:
    """The three largest shapes of FLUX.1-dev, all modes, all baselines."""
    return _rows(_by_size()[:3])


def speed(out: Path) -> Iterator[Item]:
    """FLUX.1-dev's other shapes."""
    return _rows(_by_size()[3:])


def more_shapes(out: Path) -> Iterator[Item]:
    """SDXL's and PixArt-Sigma's shapes."""
    return _rows((*SDXL.shapes, *PIXART_SIGMA.shapes))


def _by_size() -> list[LinearShape]:
    return sorted(FLUX1_DEV.shapes, key=lambda shape: shape.m * shape.k * shape.n, reverse=True)


def _rows(shapes: Iterable[LinearShape]) -> Iterator[Item]:
    def found(call: Callable[[], BenchRow]) -> Iterator[Found]:
        yield {**to_json(call()), CLOCKS: clocks(GPU)}

    settings = BenchSettings(GPU)
    for name, call in row_calls(shapes, precisions=precisions_named(None), rank=RANK, settings=settings):
        yield name, lambda call=call: found(call)


def blocks(out: Path) -> Iterator[Item]:
    """The GEMM in blocks of 128 and of 256 rows, on the largest shapes and on four images at once; whether the trial of
    the large ones passes."""
    gpu = cuda_device(GPU)
    if has_large_blocks(gpu.architecture):
        yield "trial", lambda: _trial(gpu)
    shapes = _by_size()[:3]
    shapes.append(replace(shapes[0], name=f"{shapes[0].name}, M 16384", m=16384))
    for shape in shapes:
        for precision in (Int4(), NvFp4()):
            for block_m in block_sizes(precision, gpu):
                name = f"{shape.name}: {precision.name}, {block_m} rows"
                yield name, lambda given=(shape, precision, block_m): _block_time(gpu, *given)


def _trial(gpu: CudaDevice) -> Iterator[Found]:
    found = prove_large_blocks(gpu, again=True)
    yield {"ok": found is not None and found.sound, "reason": found.reason if found else "it could not run"}


def _block_time(gpu: CudaDevice, shape: LinearShape, precision: Precision, block_m: int) -> Iterator[Found]:
    us = time_blocks(shape, precision, rank=RANK, block_m=block_m, launcher=gpu, device=GPU)
    tera = 2 * shape.m * shape.k * shape.n / us.median / 1e6
    yield {"call_us": to_json(us), "tera_operations": tera, CLOCKS: clocks(GPU)}


def self_test(out: Path) -> Iterator[Item]:
    """Every kernel against its reference."""
    gpu = cuda_device(GPU)

    def found(case: KernelCase) -> Iterator[Found]:
        disagreement = case.disagreement(gpu, GPU)
        yield {
            **{"op": case.op, "precision": case.precision, "mode": case.mode},
            **{"disagreement": disagreement, "ok": disagreement <= case.most},
        }

    dtype = torch.bfloat16 if gpu.architecture.bfloat16 else torch.float16
    for case in kernel_cases(dtype, gpu.architecture):
        yield f"{case.op} {case.precision} {case.mode}", lambda case=case: found(case)


def correctness(out: Path) -> Iterator[Item]:
    """All shapes, 1,000 launches, CUDA graphs, streams; the portable kernels and Hopper's own apart."""
    for name, file in _tests():
        yield name, lambda file=file: _run([*PYTEST, file])


def sanitizer(out: Path) -> Iterator[Item]:
    """compute-sanitizer over the self-tests and a few awkward shapes."""
    chosen = "test_self_test or (reference and (m129 or m7-) and (r32 or r80 or r64))"
    for tool in ("memcheck", "racecheck"):
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        for name, file in _tests():
            yield f"{tool} {name}", lambda file=file, words=words: _run([*words, *PYTEST, file, "-k", chosen])


def _tests() -> Iterator[tuple[str, str]]:
    for name, file in TESTS.items():
        if name == "portable" or cuda_device(GPU).architecture.hopper_modes:
            yield name, file


def overhead(out: Path) -> Iterator[Item]:
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
        yield name, lambda call=call: iter([{"us": _host_us(call)}])


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


def step(out: Path) -> Iterator[Item]:
    """A whole step of a FLUX.1-dev-shaped transformer: bfloat16, int4 in every mode, nvfp4."""
    settings = StepSettings(FLUX1_DEV_STEP, GPU, RANK)
    return _steps(settings, arithmetics(precisions_named(None), GPU))


def compiled_step(out: Path) -> Iterator[Item]:
    """The same under torch.compile too: bfloat16, and int4 in Hopper's 4-bit modes (elsewhere the portable kernels)."""
    modes = [Arithmetic(Int4(), mode) for mode in (HopperMode.EXACT, HopperMode.W4A8)]
    chosen = modes if cuda_device(GPU).architecture.hopper_modes else [Arithmetic(Int4())]
    return _steps(StepSettings(FLUX1_DEV_STEP, GPU, RANK, compiled=True), (Arithmetic(), *chosen))


def _steps(settings: StepSettings, models: Sequence[Arithmetic]) -> Iterator[Item]:
    """A model an item, the 16-bit one not beside it: ratios are worked out at the end."""
    for model in models:
        yield model.name, lambda model=model: map(to_json, step_rows(settings, (model,)))


def modes(out: Path) -> Iterator[Item]:
    """Which of Hopper's modes is the default: times of the stage `step`, images of the embedded model (needs
    diffusers and transformers). Writes FOLDER/measured_sm_90a.json, which takes effect in kernels/."""
    yield "modes", lambda: _modes(out)


def _modes(out: Path) -> Iterator[Found]:
    steps = [line for line in found_lines(out / RECORD) if line["stage"] == "step" and "us" in line]
    us = {row["precision"]: row["us"]["median"] for row in steps if row["mode"] == "CUDA graph"}
    psnr = _psnr_to_exact(out)
    names = {PORTABLE: "int4", **{mode.label: f"int4 hopper {mode.label}" for mode in HopperMode}}
    found = [
        ModeMeasurement(label, us[name], psnr[label])
        for label, name in names.items()
        if name in us and label in psnr
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

    folder = Path(tempfile.mkdtemp()) / "embedded-int4"  # what comes back of a rented machine is few files
    options = RunOptions(device="cuda")
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


def leave_hopper_out() -> None:
    """Measures the portable kernels alone."""
    kinds = (replace(kind, hopper_modes=False) for kind in architectures.ARCHITECTURES)
    architectures.ARCHITECTURES = tuple(kinds)


def _run(words: Sequence[str]) -> Iterator[Found]:
    """A command whose output goes to the screen while it runs."""
    environment = {**os.environ, "SVDQ_REQUIRE_GPU": "1"}
    tail: list[str] = []
    command = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert command.stdout is not None
    for line in command.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        tail = [*tail[-29:], line]
    status = command.wait()
    yield {"command": " ".join(words), "exit_code": status, "ok": status == 0, "tail": "".join(tail)[-3000:]}


# The most valuable first: a budget drops the tail. Seconds after which an item hangs, and with which it is begun.
STAGES: dict[str, tuple[Callable[[Path], Iterator[Item]], Stage]] = {
    stage.name: (items, stage)
    for items, stage in (
        (probe, Stage("probe", 40)),
        (largest, Stage("largest", 60)),
        (self_test, Stage("self_test", 40)),
        (blocks, Stage("blocks", 60, least_seconds=10)),
        (correctness, Stage("correctness", 150, least_seconds=30)),
        (overhead, Stage("overhead", 40)),
        (speed, Stage("speed", 60)),
        (step, Stage("step", 90, least_seconds=40)),
        (modes, Stage("modes", 240, least_seconds=60)),
        (compiled_step, Stage("compiled_step", 240, least_seconds=120)),
        (more_shapes, Stage("more_shapes", 60)),
        (sanitizer, Stage("sanitizer", 240, least_seconds=120)),
    )
}

# ------------------------------------------------------------------------------------------ what it all says


def summary(out: Path, device: BenchDevice) -> None:
    """Prints which goals were met, and writes the plot, from what the record holds."""
    rows: list[BenchRow] = []
    steps: list[StepRow] = []
    for line in found_lines(out / RECORD):
        if "us" not in line or not isinstance(line["us"], dict):
            continue
        plain = {key: value for key, value in line.items() if key not in ("stage", "item", CLOCKS)}
        kind, to = (StepRow, steps) if "model" in plain else (BenchRow, rows)
        to.append(kind(**{**plain, "us": Microseconds(**plain["us"])}))  # type: ignore[arg-type]
    for goal in (*layer_goals(rows), *step_goals(_beside_16_bit(steps))):
        word = "met" if goal.met else "MISSED"
        print(f"  {word:6} {goal.found:6.2f} {goal.wanted:8} {goal.layer:22} {goal.goal}", flush=True)
    if rows:
        draw_plot(BenchReport(device, tuple(rows), ()), out / PLOT)


def _beside_16_bit(steps: Sequence[StepRow]) -> list[StepRow]:
    """With the ratios that a step measured alone does not know."""
    baseline = next((row for row in steps if row.precision == "bfloat16"), None)
    if baseline is None:
        return []
    return [
        replace(
            row,
            ratio=baseline.us.median / row.us.median,
            memory_ratio=baseline.peak_bytes / row.peak_bytes
            if baseline.peak_bytes and row.peak_bytes and row is not baseline
            else None,
        )
        for row in steps
    ]


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


def _process(asked: argparse.Namespace) -> Callable[[str, Sequence[str]], Sequence[str]]:
    """The words that run a stage's process."""
    options = ["--portable"] if asked.portable else []
    words = [sys.executable, str(Path(__file__).resolve()), "--out", str(asked.out), *options]
    return lambda stage, over: [*words, "--serve", stage, "--over", json.dumps(list(over))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--portable", action="store_true", help="leave Hopper's own kernels out")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; what does not fit is left out")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the machine lacks")
    parser.add_argument("--serve", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--over", type=json.loads, default=[], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.portable:
        leave_hopper_out()
    if asked.serve:
        items, _ = STAGES[asked.serve]
        return serve(items(asked.out), asked.over, to=sys.stdout)

    stages = chosen_stages([asked.stages] if isinstance(asked.stages, str) else asked.stages)
    try:
        cuda_device(GPU)
    except EnvironmentLacksError as lack:
        print(f"{lack.message}. {lack.hint or ''}", file=sys.stderr)
        return lack.code
    asked.out.mkdir(parents=True, exist_ok=True)
    record, device = Record(asked.out / RECORD), device_facts(GPU)
    record.add({"stage": "device", **to_json(device)})
    left = asked.budget - (time.monotonic() - STARTED)
    sound = supervise([STAGES[name][1] for name in stages], _process(asked), record, budget=left)
    summary(asked.out, device)
    return int(not sound or any(line.get("ok") is False for line in record.lines))


if __name__ == "__main__":
    raise SystemExit(main())
