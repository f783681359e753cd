"""The calibrated tables of `make bench-peers`: their measure, a file's bytes, and what becomes of a peer that fails."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.records import Int4
from tools import bench_calibrated
from tools.bench_calibrated import mean_sqnr_db, sqnr_db, taken_by
from tools.bench_peers import rows_of, table
from tools.calibrated_methods import Layer, Problem, Remembered, bytes_of, layer
from tools.peer_methods import Taken

WIDTH = 64


@pytest.fixture
def rows() -> Tensor:
    """(16, 64) that 4 bits hold exactly: whole numbers up to 7, and a 7 in each row."""
    torch.manual_seed(0)
    found = torch.randint(-7, 8, (16, WIDTH)).float()
    found[:, 0] = 7
    return found


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, WIDTH)


def nine_tenths(weight: Tensor, smooth: float) -> Layer:
    """A layer whose output is 0.9 of the exact one's: half of it in the branch, which reads the smoothed input."""
    factors = torch.full((WIDTH,), smooth)
    up, down = torch.zeros(8, 2), torch.zeros(2, WIDTH)
    up[0, 0], down[0] = 0.5, 0.25
    exact = weight * smooth
    return layer(0.9 * exact - up @ down, factors, up, down)


def parts_of(found: Layer, name: str) -> dict[str, Tensor]:
    return {f"{name}.{part}": getattr(found, part) for part in ("weight", "smooth", "up", "down")}


@pytest.mark.parametrize("smooth", [1.0, 2.0, 0.25])
def test_a_tenth_of_the_output_lost_is_20_db(rows: Tensor, weight: Tensor, smooth: float):
    parts = parts_of(nine_tenths(weight, smooth), "a")
    assert sqnr_db(weight, parts, "a", rows, Int4()) == pytest.approx(20, abs=1e-3)


def test_inputs_are_rounded_to_4_bits_after_smoothing(rows: Tensor, weight: Tensor):
    lossless = layer(weight, torch.ones(WIDTH), torch.zeros(8, 1), torch.zeros(1, WIDTH))
    rows[:, 0] = 70  # one channel takes the resolution of the others, unless it is smoothed
    factors = torch.ones(WIDTH)
    factors[0] = 10
    smoothed = layer(weight * factors, factors, torch.zeros(8, 1), torch.zeros(1, WIDTH))
    outliers, none = (
        sqnr_db(weight, parts_of(each, "a"), "a", rows, Int4()) for each in (lossless, smoothed)
    )
    assert none > outliers + 20


def test_an_output_that_is_not_finite_is_an_error_with_the_layers_name(rows: Tensor, weight: Tensor):
    broken = layer(weight / 0, torch.ones(WIDTH), torch.zeros(8, 1), torch.zeros(1, WIDTH))
    with pytest.raises(ValueError, match=r"block\.0: its output is not finite"):
        sqnr_db(weight, parts_of(broken, "block.0"), "block.0", rows, Int4())


def test_a_rows_figure_is_the_mean_over_layers_of_rows_that_no_peer_saw(
    tmp_path: Path, rows: Tensor, weight: Tensor
):
    problems, judging, solved = (tmp_path / name for name in ("problems", "judging", "solved"))
    for folder in (problems, judging, solved):
        folder.mkdir()
    layers = {"a": nine_tenths(weight, 1.0), "b": nine_tenths(weight, 1.0)}
    worse = Layer(
        layers["b"].weight - 0.9 * weight, *(getattr(layers["b"], k) for k in ("smooth", "up", "down"))
    )
    layers["b"] = worse  # all of the output lost: 0 dB
    save_file(
        {"in.rows": torch.zeros(2, WIDTH), "a.weight": weight, "b.weight": weight.clone()},
        problems / "plain.safetensors",
    )
    (problems / "plain.json").write_text(json.dumps([{"name": "in", "layers": ["a", "b"], "branches": []}]))
    save_file({"in": rows}, judging / "plain.safetensors")
    save_file({**parts_of(layers["a"], "a"), **parts_of(layers["b"], "b")}, solved / "peer-0.safetensors")
    fine = Taken("peer", "1.0", "its way", "int4", "plain", 12.3, 1234, "peer-0.safetensors")
    fails = Taken("peer", "1.0", "another", "int4", "plain", why="AssertionError: CUDA | none")
    found = rows_of([fine, fails], lambda entry: mean_sqnr_db(entry, problems, solved, judging))
    assert found[0].figures["plain"] == pytest.approx(10, abs=1e-3)
    printed = table(found, ["plain"], "dB", (2, 0))
    assert "| peer 1.0 its way | 10.00 | 1,234 | 12 |" in printed
    assert "| peer 1.0 another | AssertionError: CUDA / none |" in printed


def test_a_peer_that_does_not_install_is_a_row_for_each_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_calibrated, "PINS", {"amd-quark": ("amd-quark==0",)})
    monkeypatch.setattr(bench_calibrated, "FOLDER", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    taken = taken_by("amd-quark", tmp_path, tmp_path, ["int4", "nvfp4"])
    assert [each.precision for each in taken] == ["int4", "nvfp4"]
    assert all(each.version == "0" and (each.why or "").startswith("not installed: ") for each in taken)


def test_bytes_are_those_of_codes_scales_factors_and_branch():
    found = Layer(torch.zeros(128, 256), torch.zeros(256), torch.zeros(128, 32), torch.zeros(32, 256))
    branch = 2 * (256 + 128 * 32 + 32 * 256)
    assert bytes_of(found, "int4") == 128 * 256 // 2 + 2 * 128 * 4 + branch
    assert bytes_of(found, "nvfp4") == 128 * 256 // 2 + 128 * 16 + 2 + branch


def test_what_methods_share_is_computed_once_and_its_time_is_owed_by_each(monkeypatch: pytest.MonkeyPatch):
    clock = iter([1.0, 4.0])
    monkeypatch.setattr("tools.calibrated_methods.time.process_time", lambda: next(clock))
    shared = Remembered()
    first = shared(("demo", "in"), lambda: torch.ones(2))
    assert shared.owed == 0
    assert shared(("demo", "in"), lambda: torch.zeros(2)) is first
    assert shared.owed == 3


def test_own_branches_are_one_a_layer(weight: Tensor):
    problem = Problem("demo", "in", [["q", "k"]], {"q": weight, "k": weight}, torch.zeros(600, WIDTH))
    assert problem.own == [["q"], ["k"]]
    assert [len(each) for each in problem.calls] == [512, 88]
