"""diffusers' own loader and modules accept what nunchaku-lite writes, and compute what we mean by it (on a CPU, with
stand-ins for the four CUDA operations)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("diffusers") is None or find_spec("diffusers.quantizers.nunchaku") is None,
    reason="needs diffusers 0.42 or later, which has the nunchaku_lite loader",
)

# The layer's output is rounded to bfloat16 once or twice and its low-rank activation once: at most 2^-9 relative each.
TOLERANCE = 3 * 2**-9


@pytest.fixture(scope="module")
def both(
    converted_flux: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folder, pipeline = tmp_path_factory.mktemp("lite"), converted_flux("int4") / "lite"
    run = subprocess.run(
        [sys.executable, "-m", "tests.formats.loading_in_diffusers", str(folder), str(pipeline)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(params=["int4", "nvfp4"])
def loaded(request: pytest.FixtureRequest, both: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return both[request.param]


def test_keys_shapes_and_dtypes_pass_the_strict_checks(loaded: dict[str, Any]) -> None:
    assert loaded["strict"] == "ok"


def test_from_pretrained_finds_every_tensor_and_changes_none(loaded: dict[str, Any]) -> None:
    assert [key for key, names in loaded["loading_info"].items() if names] == []
    assert loaded["stored_differently"] == []


def test_every_target_is_diffusers_own_quantized_module(loaded: dict[str, Any]) -> None:
    for name, kind in loaded["kinds"].items():
        assert kind == ("AWQW4A16Linear" if ".norm" in name else "SVDQW4A4Linear"), name
    assert set(loaded["kinds"].values()) == {"AWQW4A16Linear", "SVDQW4A4Linear"}


def test_the_whole_model_runs_and_every_layer_in_it_follows_the_formula(loaded: dict[str, Any]) -> None:
    assert loaded["model_output_finite"]
    assert loaded["errors_in_model"].keys() == loaded["kinds"].keys()
    assert {name: error for name, error in loaded["errors_in_model"].items() if error > TOLERANCE} == {}


def test_every_layer_follows_the_formula_for_1_17_and_257_rows(loaded: dict[str, Any]) -> None:
    assert {name: errors for name, errors in loaded["errors_alone"].items() if max(errors) > TOLERANCE} == {}


def test_the_pipeline_generates_an_image_when_it_is_loaded_as_its_model_card_says(
    both: dict[str, dict[str, Any]],
) -> None:
    """Without a dtype, diffusers makes the text encoders float32, and the first layer of the transformer fails."""
    assert both["card"]["size"] == [32, 32]
    assert "SVDQW4A4Linear" in both["card"]["kinds"]
