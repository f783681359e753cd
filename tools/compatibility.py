"""`make compatibility`: models that other libraries saved, read by svdq, and how they round to symmetric int4.

    python -m tools.compatibility --only quanto sdnq

Makes an environment in build/compatibility (the libraries' pinned wheels; torch and diffusers are this project's) and
prints the two tables of docs/compatibility.md that are about them. The exit code is 1 as soon as a cell is otherwise
than CASES and ROUNDED say; a library that can't be installed or run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from svdq_cli.errors import InputError
from svdq_cli.source import open_source
from tools.bench_peers import python_of

FOLDER = Path("build/compatibility")
SCRIPT = Path(__file__).with_name("other_quantizers.py")
PINS = {
    "optimum-quanto": "0.2.7",
    "torchao": "0.18.0",
    "sdnq": "0.2.8",
    "nvidia-modelopt": "0.47.0",
    "hqq": "0.2.8.post1",
    "mlx[cpu]": "0.32.4",
    "nncf": "3.4.0",
    "openvino": "2026.4.1",
    "cache-dit": "1.5.3",
    "auto-round": "0.16.1",
    "gguf": "0.19.0",
}
MINUTES = 10  # for one library


@dataclass(frozen=True, slots=True)
class Case:
    """What a library saves, and what svdq says of the folder and of its weight file alone. `None`: it reads it."""

    name: str  # in tools.other_quantizers
    package: str
    folder: str | None
    file: str | None


_ALONE = "config can't be derived"  # read as soon as --base gives the config
CASES = (
    Case("quanto int4", "optimum-quanto", r"\(quanto\)", r"\(quanto\)"),
    Case("quanto float8", "optimum-quanto", r"\(quanto\)", r"\(quanto\)"),
    Case("torchao int8", "torchao", r"\(torchao\)", r"\(torchao\)"),
    Case("sdnq int4", "sdnq", r"\(SDNQ\)", r"\(SDNQ: \S+ is stored as U8"),
    Case("sdnq int4 with SVD", "sdnq", r"\(SDNQ\)", r"\(SDNQ\)"),
    Case("modelopt FP8", "nvidia-modelopt", r"\(NVIDIA ModelOpt\)", _ALONE),
    Case("modelopt NVFP4", "nvidia-modelopt", r"\(NVIDIA ModelOpt\)", r"\(NVFP4\)"),
    Case("modelopt MXFP8", "nvidia-modelopt", r"\(NVIDIA ModelOpt\)", r"\(MXFP8 or MXFP4\)"),
    Case("hqq int4", "hqq", r"\(HQQ\)", r"\(HQQ\)"),
    Case("mlx int4", "mlx[cpu]", r"\(MLX\)", r"\(MLX\)"),
    Case("mlx mxfp4", "mlx[cpu]", r"\(MLX\)", r"\(MLX\)"),
    Case("mlx 16 bits", "mlx[cpu]", _ALONE, _ALONE),
    Case("nncf int8", "nncf", r"\(NNCF\)", r"\(NNCF\)"),
    Case("openvino", "openvino", "holds an OpenVINO model", "an OpenVINO model"),
)
# What 10 and -10 become, as the largest weights of their groups, and -9.9 beside 10
ROUNDED: dict[str, tuple[float, float, float]] = {
    "sdnq": (10.0, -10.0, -10.0),
    "nvidia-modelopt": (10.0, -10.0, -10.0),
    "cache-dit": (10.0, -10.0, -10.0),
    "torchao": (9.33, -10.67, -9.33),
    "auto-round": (10.0, -10.0, -8.75),
    "gguf": (10.0, -10.0, -8.75),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compatibility", description=(__doc__ or "").partition("\n")[0]
    )
    names = sorted({case.package for case in CASES} | ROUNDED.keys())
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="PACKAGE")
    wanted: Sequence[str] = parser.parse_args().only
    python = python_of(FOLDER / "venv")
    missing = {name: why for name in wanted if (why := installed(python, name))}
    wrong = False
    print("| saved by | svdq says of the folder | of the file alone | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for case in CASES if case.package in wanted):
            cells, fine = tried(case, python, Path(folder), missing.get(case.package))
            wrong |= not fine
            print(
                f"| {case.name} {PINS[case.package]} | {' | '.join(cells)} | {'' if fine else 'unexpected'} |"
            )
    print("\n| rounded by | 10 | -10 | -9.9 beside 10 | |\n|---|---:|---:|---:|---|")
    for name in (name for name in ROUNDED if name in wanted):
        found, why = run(python, "round", name) if name not in missing else ("", missing[name])
        numbers = tuple(json.loads(found.splitlines()[-1])) if not why else ()
        fine = numbers == ROUNDED[name]
        wrong |= not fine
        cells = " | ".join(map(str, numbers)) or f"{why} | |"
        print(f"| {name} {PINS[name]} | {cells} | {'' if fine else 'unexpected'} |")
    return int(wrong)


def installed(python: Path, package: str) -> str:
    """Install a package; why it can't be, or nothing."""
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"{package}=={PINS[package]}",
    ]
    return _run(pip)[1]


def tried(case: Case, python: Path, folder: Path, missing: str | None) -> tuple[list[str], bool]:
    """What svdq says of a library's folder and of the file in it, and whether both are as expected."""
    saved = folder / case.name.replace(" ", "-")
    why = missing or run(python, "save", case.name, saved)[1]
    if why:
        return [f"not saved: {why}", ""], False
    weights = next(iter(sorted((*saved.glob("*.safetensors"), *saved.glob("*.xml")))))
    said = [said_of(path).replace(str(path), "") for path in (saved, weights)]
    fine = all(
        re.search(wanted, words) is not None if wanted else not words
        for wanted, words in zip((case.folder, case.file), said, strict=True)
    )
    return [words.lstrip(": ") or "read" for words in said], fine


def said_of(path: Path) -> str:
    """The message of svdq's refusal; nothing where it reads the model."""
    try:
        open_source(path)
    except InputError as error:
        return error.message
    return ""


def run(python: Path, *words: str | Path) -> tuple[str, str]:
    """What tools.other_quantizers prints, and why it failed, if it did."""
    return _run([python, SCRIPT, *words])


def _run(command: Sequence[str | Path]) -> tuple[str, str]:
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env = {**os.environ, **quiet, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return "", f"not done after {MINUTES} minutes"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return done.stdout.strip(), lines[-1].replace("|", "/") if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
