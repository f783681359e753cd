"""Hostile and broken input: every kind is refused with its exit code and in words, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svdq_cli.cli import run
from tests.hostile.cases import CASES, Case


def everything(folder: Path) -> dict[str, int]:
    return {str(p): p.lstat().st_size for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_words_and_leaves_nothing(
    case: Case, tiny_flux_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    case.damage(tmp_path)
    before = everything(tmp_path)
    places = {"FOLDER": str(tiny_flux_copy), "HERE": str(tmp_path), "OUT": str(tmp_path / "out")}

    def filled(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    code = run([filled(word) for word in case.words.split(" ")] + ["--json"])
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert (code, error["code"]) == (case.code, case.code), error
    assert filled(case.says) in error["message"]
    assert not case.kind or error["kind"] == case.kind, error
    assert error["hint"], error
    assert "Traceback" not in captured.err
    assert all(mark.isprintable() or mark == "\n" for mark in captured.err)
    assert everything(tmp_path) == before
