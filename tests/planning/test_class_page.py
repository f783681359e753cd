"""`make classes` on a few classes: the whole takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.model_class_facts import EXPECTED
from tools.model_classes import PAGE, classes, page, row_of, wrong_in


@pytest.mark.parametrize("name", ["Lumina2Transformer2DModel", "Krea2Transformer2DModel", "UVit2DModel"])
def test_a_class_is_seen_and_planned_as_its_source_says(name: str, tmp_path: Path):
    row = row_of(name, tmp_path)
    assert (row.plan, row.wrong) == ("seen", ())


def test_a_class_without_a_forward_pass_is_said_to_be_planned_by_names(tmp_path: Path):
    assert row_of("MotionAdapter", tmp_path).plan == "by names"


def test_a_role_that_the_source_does_not_call_for_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = row_of("UVit2DModel", tmp_path)
    assert row.report is not None
    monkeypatch.setitem(dict(EXPECTED), "UVit2DModel", {})
    monkeypatch.setattr("tools.model_classes.EXPECTED", {})
    assert len(list(wrong_in("UVit2DModel", row.report))) == 72


def test_what_is_refused_has_a_reason_in_its_row(tmp_path: Path):
    row = row_of("SanaVideoTransformer3DModel", tmp_path)
    assert row.report is None
    assert "2240 is not a multiple of 128" in page([row], "1")


def test_the_page_has_a_row_for_every_class():
    text = PAGE.read_text()
    assert [name for name in classes() if f"| {name} |" not in text] == []
