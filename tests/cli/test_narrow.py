"""A terminal too narrow for a table cuts no name and no figure off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svdq_cli.cli import run


def test_names_and_figures_are_whole_in_a_narrow_terminal(
    tiny_flux: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run(["inspect", str(tiny_flux), "--json"]) == 0
    names = [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]]
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["inspect", str(tiny_flux), "-v"]) == 0
    shown = capsys.readouterr().out
    assert names
    assert [name for name in names if name not in shown] == []
    assert "…" not in shown
    # what has the room keeps to it
    facts = shown[: shown.index("role ")]
    assert max(map(len, facts.splitlines())) == 40
