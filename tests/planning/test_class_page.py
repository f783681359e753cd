"""`make classes` on a few classes: the whole takes minutes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svdq_cli.entrypoints.inspect import inspect_source
from svdq_cli.planning.structure import ROUTER
from svdq_cli.recipe import default_recipe
from svdq_cli.reports import InspectReport
from tools import class_results
from tools.class_results import Result, each_in_a_process, keep, known, page
from tools.model_class_facts import WITHOUT_PIPELINE
from tools.model_classes import classes, planned, wrong_in


@pytest.mark.parametrize(
    "name",
    [
        "Lumina2Transformer2DModel",
        "Krea2Transformer2DModel",
        "UVit2DModel",
        # conditioned by residue, its updates of pairs in a dictionary with gaps
        "RFD4ProteinaTransformer",
    ],
)
def test_a_class_is_seen_and_planned_as_its_source_says(name: str, tmp_path: Path):
    result = planned(name, tmp_path)
    assert (result.plan, result.wrong) == ("seen", ())


def test_a_vector_that_is_repeated_for_every_token_modulates_whatever_layers_it_went_through(tmp_path: Path):
    result = planned("RFD4ProteinaTransformer", tmp_path)
    # per layer two scales of outputs, and gamma and beta of two norms
    assert result.w4a16 == 14 * 6
    assert "pair_update_layers" not in result.note


def test_a_class_without_a_forward_pass_is_said_to_be_planned_by_names(tmp_path: Path):
    assert planned("MotionAdapter", tmp_path).plan == "by names"


@pytest.fixture
def report(tmp_path: Path) -> InspectReport:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UVit2DModel", "num_hidden_layers": 1}))
    return inspect_source(default_recipe(str(tmp_path / "config.json")))


def test_a_role_that_the_source_does_not_call_for_is_counted(
    report: InspectReport, monkeypatch: pytest.MonkeyPatch
):
    modulation = [layer.name for layer in report.layers if layer.role == "w4a16"]
    assert list(wrong_in("UVit2DModel", report, {})) == []
    monkeypatch.setattr("tools.model_classes.EXPECTED", {})
    assert list(wrong_in("UVit2DModel", report, {})) == [f"{name} is w4a16" for name in modulation]


def test_a_layer_kept_for_what_it_is_not_is_counted_and_one_kept_for_its_size_is_not(report: InspectReport):
    first = next(layer for layer in report.layers if layer.role == "w4a4")
    kept = replace(report, layers=tuple(replace(e, role="kept") if e is first else e for e in report.layers))
    assert list(wrong_in("UVit2DModel", kept, {first.name: ROUTER})) == [f"{first.name} is kept"]
    assert list(wrong_in("UVit2DModel", kept, {first.name: "in_features 320 is not a multiple of 128"})) == []


def test_what_is_refused_has_a_reason_in_its_row(tmp_path: Path):
    result = planned("SanaVideoTransformer3DModel", tmp_path)
    assert result.plan == "none"
    assert "refused: nothing to quantize" in page({"SanaVideoTransformer3DModel": result})


def test_the_page_has_a_row_for_every_class_and_is_what_the_results_give():
    text = class_results.PAGE.read_text()
    assert [name for name in classes() if f"| {name} |" not in text] == []
    assert text == page(known())


def test_every_class_is_calibrated_or_its_row_says_why_not():
    silent = [name for name, each in known().items() if not each.calibrated and name not in WITHOUT_PIPELINE]
    assert silent == []


def test_a_run_that_was_stopped_goes_on_and_what_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(class_results, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(class_results, "PAGE", tmp_path / "page.md")

    def keep_it(name: str, found: str) -> None:
        if name == "c":
            raise KeyboardInterrupt
        keep(name, plan="seen", data_free=found)

    with pytest.raises(KeyboardInterrupt):
        each_in_a_process("abcd", _work, keep_it, jobs=1, run="some")
    assert known() == {
        "a": Result("seen", data_free="ok"),
        "b": Result("seen", data_free="ValueError: b is too wide"),
    }
    done: list[str] = []
    each_in_a_process("abcd", _work, lambda name, found: done.append(name), jobs=1, run="some")
    assert done == ["c", "d"]
    assert "| b | seen |" in (tmp_path / "page.md").read_text()


def _work(name: str) -> str:
    if name == "b":
        raise ValueError("b is\ntoo wide")
    return "ok"
