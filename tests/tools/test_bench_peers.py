"""The table of `make bench-peers`: its measure, and what becomes of a peer that fails."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools import bench_peers
from tools.bench_peers import Row, mean_error, relative_error, rows_of, table, taken_by
from tools.peer_methods import Taken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = {"a": torch.randn(8, 64), "b": torch.randn(8, 64)}
    save_file(weights, tmp_path / "plain.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for share, (name, weight) in zip((0.1, 0.3), weights.items(), strict=True):
        up, down = torch.randn(8, 2), torch.randn(2, 64)
        parts |= {f"{name}.weight": (1 - share) * weight - up @ down, f"{name}.up": up, f"{name}.down": down}
    save_file(parts, tmp_path / "peer-0.safetensors")
    return tmp_path


def rows_in(folder: Path, taken: list[Taken]) -> list[Row]:
    return rows_of(taken, lambda entry: mean_error(entry, folder, folder))


def printed(rows: list[Row]) -> str:
    return table(rows, ["plain"], "error", (4, 2))


def test_a_rows_error_is_the_mean_over_layers_of_what_weight_and_branch_miss(folder: Path):
    taken = [Taken("peer", "1.0", "its way", "int4", "plain", 0.5, 1234, "peer-0.safetensors")]
    (row,) = rows_in(folder, taken)
    assert row.figures["plain"] == pytest.approx(0.2, rel=1e-5)
    assert "| peer 1.0 its way | 0.2000 | 1,234 | 0.50 |" in printed([row])


def test_nothing_lost_is_no_error():
    parts = {"a.weight": torch.ones(4, 8), "a.up": torch.zeros(4, 1), "a.down": torch.zeros(1, 8)}
    assert relative_error(torch.ones(4, 8), parts, "a") == 0


@pytest.mark.parametrize(
    ("pins", "said"),
    [({"sdnq": "0"}, "not installed: "), ({}, "not run: ")],
    ids=["its package does not install", "its process fails"],
)
def test_a_peer_that_fails_is_a_row_that_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pins: dict[str, str], said: str
):
    monkeypatch.setattr(bench_peers, "PINS", pins)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    taken = taken_by("sdnq", Path(sys.executable), folder, folder)
    (row,) = rows_in(folder, taken)
    assert row.why
    assert row.why.startswith(said)
    assert f"| sdnq {pins.get('sdnq', '')}".rstrip() in printed([row])


def test_a_method_that_raises_leaves_the_others_their_rows(folder: Path):
    fine = Taken("peer", "1", "one", "int4", "plain", 0.5, 10, "peer-0.safetensors")
    fails = Taken("peer", "1", "other", "int4", "plain", why="ValueError: no | such thing")
    shown = printed(rows_in(folder, [fails, fine]))
    assert "| peer 1 other | ValueError: no / such thing |" in shown
    assert "| peer 1 one | 0.2000 |" in shown
