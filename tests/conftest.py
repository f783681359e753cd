"""What every test shares: no network, one thread, and one tiny pipeline."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read by the libraries when they are imported, hence before any of them
# Of the processes that tests start, too: two threads of torch on cores that other tests use are slower than one
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Not in a run of kernels/measure.py: what an earlier stage compiled is not compiled again
if os.environ.get("SVDQ_REQUIRE_GPU") != "1":
    os.environ["SVDQ_CACHE"] = os.path.join(tempfile.gettempdir(), f"svdq-tests-cache-{os.getuid()}")
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), f"svdq-tests-hf-{os.getuid()}")

# `tests.tiny` is found whether pytest is started as a module or as a command
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny layers run slower on two threads than on one, and much slower where other work has the cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A FluxPipeline folder that all tests read and none writes: one double and one single block, bfloat16."""
    from tests.tiny import tiny_flux_pipeline

    folder = tiny_flux_pipeline(tmp_path_factory.mktemp("tiny") / "flux")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for file in files:
        file.chmod(0o444)
    yield folder
    for file in files:
        file.chmod(0o644)


@pytest.fixture
def tiny_flux_copy(tiny_flux: Path, tmp_path: Path) -> Path:
    """A copy that the test may change or damage."""
    folder = tmp_path / "flux"
    for source in tiny_flux.rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(tiny_flux)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture
def write_text(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a small UTF-8 file and returns its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def converted_flux(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By precision, a folder that holds `lite/` and one `FORMAT.safetensors` for each other format."""
    from svdq_cli.conversion.convert import convert
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.recipe import Output, Quantization, default_recipe

    made: dict[str, Path] = {}

    def of(precision: str) -> Path:
        if precision not in made:
            folder = tmp_path_factory.mktemp(precision)
            names = ("nunchaku", "comfy") if precision == "int4" else ("nunchaku",)
            paths = {"nunchaku-lite": folder / "lite"}
            paths |= {name: folder / f"{name}.safetensors" for name in names}
            recipe = default_recipe(
                str(tiny_flux),
                quantization=Quantization.model_validate(
                    {"precision": precision, "rank": 16, "effort": "datafree"}
                ),
                outputs=[Output.model_validate({"format": n, "path": str(p)}) for n, p in paths.items()],
            )
            convert(recipe, tuple(paths.values()), options=RunOptions(device="cpu"))
            made[precision] = folder
        return made[precision]

    return of
