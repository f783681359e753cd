"""kernels/measure.py without a GPU: it says what is missing at once, and needs little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdq_cli.storage.resources import data_root

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
