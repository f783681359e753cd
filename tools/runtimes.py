"""Load files of svdq with other programs' own loaders, from their pinned wheels, each in an environment of its own.

`make runtimes`: about ten minutes and 6 GB below build/runtimes the first time. No GPU: files of small models are
written, loaded on the CPU, and, where the program has an emulation of its kernel, multiplied. What does not load is
known, too: the exit code is 1 as soon as anything is otherwise than `CASES` says. docs/compatibility.md has the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.formats.nunchaku import sglang_name
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe
from svdq_cli.records import W4A4Solution
from svdq_cli.runtime.linear import w4a4_forward
from svdq_cli.solve.quantizers import decode_e2m1
from svdq_cli.source import read_tensor
from tests.tiny import tiny_flux_pipeline
from tests.tiny_families import tiny_pipeline

HOME = Path(__file__).parents[1]
PLACE = HOME / "build/runtimes"
RANK = 32
LEAST_DB = 40.0  # of products that differ by roundings to bfloat16

# Unpacked as they are; tools/runtime_loaders/NAME.txt has what their loaders import.
WHEELS = {"vllm_omni": ("vllm==0.30.0", "vllm-omni==0.30.0"), "sglang": ("sglang==0.5.23",)}


@dataclass(frozen=True, slots=True)
class Case:
    """A file, the program that it is put to, and what that is known to do with it."""

    runtime: str
    format: str
    family: str
    precision: str
    loads: bool = True
    said: str = ""  # by the program, where it does not load


CASES = (
    Case("vllm_omni", "vllm-omni", "z-image", "nvfp4"),
    Case("sglang", "nunchaku", "z-image", "int4"),
    Case("sglang", "nunchaku", "z-image", "nvfp4"),
    # its table of names takes FLUX.1's single blocks for FLUX.2's
    Case("sglang", "nunchaku", "flux", "int4", loads=False, said="New parameter '"),
    # it gives every linear to the quantization, those before and after the blocks too
    Case("sglang", "nunchaku", "qwen-image", "int4", loads=False, said="New parameter '"),
)

# run where NUNCHAKU names a checkout
NUNCHAKU_CASES = tuple(
    Case("nunchaku", "nunchaku", family, precision)
    for family in ("flux", "qwen-image", "sdxl", "z-image")
    for precision in ("int4", "nvfp4")
)


def main() -> int:
    wrong = 0
    cases = (*CASES, *(NUNCHAKU_CASES if "NUNCHAKU" in os.environ else ()))
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found = run(case, Path(folder))
            agrees = found["loads"] is case.loads and case.said in found.get("said", "")
            agrees = agrees and not found.get("lost") and found.get("db", LEAST_DB) >= LEAST_DB
            wrong += not agrees
            program = ", ".join(WHEELS.get(case.runtime, (case.runtime,)))
            print(
                f"{case.format} {case.family} {case.precision} in {program}: "
                f"{json.dumps(found)}{'' if agrees else '  <- NOT AS KNOWN'}",
                flush=True,
            )
    return 1 if wrong else 0


def run(case: Case, folder: Path) -> dict[str, Any]:
    """What the program's loader says of the case's file."""
    # Nunchaku's classes need what SGLang's loader imports
    python, paths = environment("sglang" if case.runtime == "nunchaku" else case.runtime)
    file = written(case, folder)
    arguments = [case.family, str(file)]
    if case.runtime == "nunchaku":
        arguments.insert(1, case.precision)
    if case.runtime == "vllm_omni":
        expected = folder / "expected.safetensors"
        save_file(dict(products(file)), expected)
        arguments = [str(file), str(expected)]
    script = HOME / f"tools/runtime_loaders/load_in_{case.runtime}.py"
    done = subprocess.run(
        [python, script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(name: str) -> tuple[Path, list[str]]:
    """The program's interpreter, and where its wheels are unpacked, made on first use. Compiled parts stay out: none
    of them runs without a GPU."""
    place, wheels = PLACE / name, WHEELS[name]
    python, stamp = place / "venv/bin/python", place / "installed"
    requirements = HOME / f"tools/runtime_loaders/{name}.txt"
    said = "\n".join((*wheels, requirements.read_text()))
    if not stamp.is_file() or stamp.read_text() != said:
        print(f"installing {', '.join(wheels)} into {place}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", place / "venv"], check=True)
        pip = [python, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--requirement", requirements], check=True)
        # of SGLang there are only wheels for newer Pythons; its Python code runs here as well
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--dest", place / "wheels"]
        subprocess.run([*pip, "download", *options, *wheels], check=True)
        for wheel in (place / "wheels").glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    place / "unpacked", [n for n in archive.namelist() if not n.endswith(".so")]
                )
            wheel.unlink()
        stamp.write_text(said)
    return python, [str(place / "unpacked")]


def written(case: Case, folder: Path) -> Path:
    """The file of a small model, under the name that SGLang reads."""
    pipeline = folder / case.family
    if not pipeline.is_dir():
        if case.family == "flux":
            tiny_flux_pipeline(pipeline)
        else:
            tiny_pipeline(case.family, pipeline)
    file = folder / sglang_name(f"{case.family}.{case.format}.safetensors", case.precision, RANK)
    recipe = default_recipe(
        str(pipeline / ("unet" if case.family == "sdxl" else "transformer")),
        quantization=Quantization.model_validate(
            {"precision": case.precision, "rank": RANK, "effort": "datafree"}
        ),
        outputs=[Output.model_validate({"format": case.format, "path": str(file)})],
    )
    convert(recipe, (file,), options=RunOptions(device="cpu"))
    return file


def products(file: Path) -> Iterator[tuple[str, Tensor]]:
    """An input and svdq's product for every module of a file.

    The inputs are numbers that nvfp4 holds, with a 6 in every group. Kernels differ in whether they quantize by a
    group's scale before or after it was rounded to e4m3: for other inputs they agree to 22 dB only.
    """
    checkpoint = open_checkpoint(file)
    seeded = torch.Generator().manual_seed(0)
    for module in checkpoint.file.modules:
        specs = checkpoint.format.tensor_specs(module.plan, checkpoint.dtype, module.traits)
        tensors = {name: read_tensor(checkpoint.source, f"{module.name}.{name}") for name in specs}
        solution = checkpoint.format.decode(module.plan, tensors, module.traits)
        assert isinstance(solution, W4A4Solution)
        codes = torch.randint(0, 16, (8, module.plan.linear.in_features), generator=seeded)
        x = decode_e2m1(codes).bfloat16()
        x[:, :: module.plan.precision.group] = 6  # type: ignore[union-attr]
        yield f"{module.name}.x", x
        yield f"{module.name}.y", w4a4_forward(x, solution)


if __name__ == "__main__":
    sys.exit(main())
