"""kernels/measure.py without a GPU: it says what is missing at once, and needs little."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from svdq_cli.bench import run
from svdq_cli.bench.block_sizes import block_sizes, time_blocks
from svdq_cli.bench.device import clocks, device_facts
from svdq_cli.bench.shapes import LinearShape
from svdq_cli.bench.step import StepSettings
from svdq_cli.bench.transformer import TransformerShape
from svdq_cli.gpu.architectures import architecture
from svdq_cli.records import Int4, NvFp4
from svdq_cli.storage.resources import data_root
from tests.gpu.emulation import EmulatedDevice, needs_compiler

MEASURE = data_root("kernels") / "measure.py"
# What svdq requires and a rented machine with torch and CuPy may lack
NOT_NEEDED = (
    *("diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "tokenizers", "safetensors"),
    *(
        "pydantic",
        "yaml",
        "typer",
        "rich",
        "filelock",
        "torchmetrics",
        "matplotlib",
        "jinja2",
        "gguf",
        "peft",
    ),
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def measure(folder: Path, *words: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs it as a command where the packages `absent` are not installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    (folder / "sitecustomize.py").write_text(block, encoding="utf-8")
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(MEASURE), *words, "--out", str(folder / "out")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_needs_nothing_of_diffusers_and_refuses_without_a_gpu(tmp_path: Path):
    done = measure(tmp_path, "speed", "step", "probe", absent=NOT_NEEDED)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "torch sees no NVIDIA GPU. install a torch built for CUDA, and its driver\n"
    assert not (tmp_path / "out").exists()


def test_what_a_stage_lacks_is_said_before_the_first_one_starts(tmp_path: Path):
    done = measure(tmp_path, "speed", "modes", absent=("diffusers", "pydantic"))
    assert (done.returncode, done.stderr) == (1, "modes: pip install diffusers pydantic\n")
    everything = measure(tmp_path, "all", absent=("diffusers",))
    assert "== modes: left out: pip install diffusers\n" in everything.stdout


def test_a_package_that_every_stage_needs_is_named(tmp_path: Path):
    done = measure(tmp_path, "speed", absent=("PIL",))
    assert (done.returncode, done.stderr) == (1, "kernels/measure.py: pip install pillow\n")


def wheel(folder: Path, name: str, code: str = "", *, tag: str = "py3-none-any") -> Path:
    """A wheel of one module."""
    folder.mkdir(exist_ok=True)
    path, facts = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{facts}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{facts}/RECORD", "")
    return path


def test_a_carried_wheel_is_there_for_every_process_of_the_run(tmp_path: Path):
    """A process that measures is one like it: what its PYTHONPATH brings, it has."""
    wheel(tmp_path / "carried", "svdq_carried", "ANSWER = 42")
    code = (
        "import os, runpy, subprocess, sys; sys.argv = ['measure.py', '--help']\n"
        f"sys.path.insert(0, {str(MEASURE.parent)!r})\n"
        "import measure; from pathlib import Path\n"
        f"measure.install_wheels(Path({str(tmp_path / 'carried')!r}))\n"
        "import svdq_carried; print(svdq_carried.ANSWER)\n"
        "subprocess.run([sys.executable, '-c', 'import svdq_carried; print(svdq_carried.ANSWER)'], check=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (
        "== wheels for this run: svdq_carried-1.0-py3-none-any.whl\n42\n42\n",
        "",
    )


def test_a_wheel_may_bring_what_every_stage_needs(tmp_path: Path):
    wheel(tmp_path / "carried", "svdq_carried")
    wheel(tmp_path / "carried", "numpy", "raise RuntimeError('the machine has its own')")
    done = measure(tmp_path, "speed", "--wheels", str(tmp_path / "carried"), absent=("PIL",))
    # Wheels come first, and leave what is installed alone
    assert done.stdout == "== wheels for this run: svdq_carried-1.0-py3-none-any.whl\n"
    assert (done.returncode, done.stderr) == (1, "kernels/measure.py: pip install pillow\n")


def test_wheels_that_can_not_be_installed_are_named(tmp_path: Path):
    (tmp_path / "carried").mkdir()
    done = measure(tmp_path, "speed", "--wheels", str(tmp_path / "carried"))
    assert (done.returncode, done.stderr) == (1, f"--wheels {tmp_path / 'carried'}: no wheels are there\n")
    wheel(tmp_path / "carried", "svdq_carried", tag="cp27-cp27m-win32")
    done = measure(tmp_path, "speed", "--wheels", str(tmp_path / "carried"))
    assert done.returncode == 1
    assert "svdq_carried-1.0-cp27-cp27m-win32.whl is not a supported wheel" in done.stderr


def test_stages_measure_what_they_say_on_a_cpu_in_a_gpus_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The items of layers and steps, as their process tells them, and the summary of the record."""
    spec = importlib.util.spec_from_file_location("measure", MEASURE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    cpu = torch.device("cpu")
    shapes = [LinearShape(name, 2, 128, 128) for name in "abc"] + [LinearShape("m", 1, 128, 128, "w4a16")]
    monkeypatch.setitem(run.BASELINES, "cpu", (torch.bfloat16,))
    monkeypatch.setattr(run, "gpu_baselines", lambda rows: [])
    small = TransformerShape("small", 128, 2, 256, 1, 1, 20, 12)
    for name, value in {
        **{"GPU": cpu, "_by_size": lambda: shapes, "FLUX1_DEV_STEP": small},
        "BenchSettings": lambda device: run.BenchSettings(device, seconds_per_row=1e-3),
        "StepSettings": lambda *given: StepSettings(*given, seconds=1e-3),
    }.items():
        monkeypatch.setattr(module, name, value)
    record = module.Record(tmp_path / module.RECORD)
    told: dict[str, list[str]] = {}
    for stage in ("largest", "speed", "step"):
        said = io.StringIO()
        assert module.serve(module.STAGES[stage][0](tmp_path), [], to=said) == 0
        lines = [json.loads(line) for line in said.getvalue().splitlines()]
        told[stage] = [line["begin"] for line in lines if "begin" in line]
        for found in (line["found"] for line in lines if "found" in line):
            record.add({"stage": stage, "item": stage, **found})
    assert {name.split(":")[0] for name in told["largest"]} == {"a", "b", "c"}
    assert {name.split(":")[0] for name in told["speed"]} == {"m"}
    assert told["step"] == ["bfloat16", "int4", "nvfp4"]
    module.summary(tmp_path, device_facts(cpu))
    assert "memory of bfloat16 over ours" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measured.jsonl", "measured.png"]


@needs_compiler
def test_blocks_of_either_size_are_timed():
    """An emulated card on a CPU: that the figures are of the blocks they are called after."""
    seen: list[int] = []

    class Watched(EmulatedDevice):
        def launch(self, variant, grid, threads, *arguments) -> None:
            if variant.kernel == "w4a4_gemm":
                seen.append(dict(variant.defines)["BLOCK_M"])
            super().launch(variant, grid, threads, *arguments)

    launcher = Watched(architecture("sm_89"))
    assert block_sizes(Int4(), launcher) == (128, 256)
    assert block_sizes(NvFp4(), launcher) == (128,)
    shape = LinearShape("a", 256, 64, 128)
    for block_m in block_sizes(Int4(), launcher):
        seen.clear()
        us = time_blocks(
            *(shape, Int4()),
            **{"rank": 16, "block_m": block_m, "launcher": launcher},
            device=torch.device("cpu"),
            seconds=1e-3,
        )
        assert us.median > 0
        assert set(seen) == {block_m}


def test_clocks_are_told_where_a_driver_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks(torch.device("cuda", 0)) is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980 MHz, 2619 MHz, 612.33 W, 61'\n")
    program.chmod(0o755)
    assert clocks(torch.device("cuda", 0)) == {
        **{"clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz"},
        **{"power.draw": "612.33 W", "temperature.gpu": "61"},
    }


def test_a_run_begins_with_what_decides_most():
    order = ["probe", "largest", "self_test", "correctness"]
    text = MEASURE.read_text(encoding="utf-8")
    places = [text.index(f'Stage("{stage}"') for stage in order]
    assert places == sorted(places)
