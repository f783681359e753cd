"""`svdq convert a.yaml b.yaml`: every recipe is tried, and one table, object and exit code speak for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svdq_cli.cli import run
from svdq_cli.cli.several import convert_each
from svdq_cli.errors import InterruptedRunError
from svdq_cli.records import ignore_events
from svdq_cli.reports import ConvertReport


@pytest.fixture
def recipe(tiny_flux: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a data-free recipe that converts the tiny model to `tmp_path/out/NAME`."""

    def write(name: str, *, source: Path = tiny_flux, rank: int = 16, gates: str = "{}") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"version: 1\nmodel: {{source: {source}}}\nquantization: {{effort: datafree, rank: {rank}}}\n"
            f"outputs: [{{path: {tmp_path}/out/{name}}}]\ngates: {gates}\n"
        )
        return path

    return write


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_recipes_after_a_failed_one_are_converted_and_the_worst_code_is_the_command_s(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [
        recipe("missing", source=tmp_path / "nowhere"),
        recipe("good"),
        recipe("gated", gates='{size_ratio: ">= 50"}'),
        recipe("wrong", rank=17),
    ]
    assert run(["convert", *map(str, files), "--json", "-q"]) == 3
    report = said(capsys)
    assert (report["schema"], report["command"], report["status"], report["code"]) == (
        1,
        "convert",
        "error",
        3,
    )
    assert [(run["source"], run["code"]) for run in report["runs"]] == [
        (str(file), code) for file, code in zip(files, (3, 0, 6, 2), strict=True)
    ]
    missing, good, gated, wrong = (run["report"] for run in report["runs"])
    assert missing["error"]["kind"] == "not-found"
    assert good == json.loads((tmp_path / "out/good/svdq_report.json").read_text())
    assert gated["status"] == "gate-missed"
    assert wrong["error"]["message"].startswith(f"{files[3]}:3: quantization.rank")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gated", "good"]


def test_people_get_one_table_and_the_reasons_below(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [recipe("good"), recipe("missing", source=tmp_path / "nowhere")]
    assert run(["convert", *map(str, files), "--plan"]) == 3
    head, good, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["exit", "code", "status"]
    assert good.split()[:2] == ["0", "planned"]


@pytest.mark.parametrize("option", ["-o OUT", "--calib CALIB"])
def test_what_means_one_conversion_is_refused_with_several(
    recipe: Callable[..., Path], option: str, capsys: pytest.CaptureFixture[str]
):
    files = [str(recipe("first")), str(recipe("second"))]
    assert run(["convert", *files, *option.split(), "--json"]) == 2
    assert option.split()[0] in said(capsys)["error"]["message"]


def test_several_models_without_recipes_are_refused(tiny_flux: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["convert", str(tiny_flux), str(tiny_flux), "--json"]) == 2
    assert "must be a recipe" in said(capsys)["error"]["message"]


def test_a_bug_in_one_conversion_keeps_its_traceback_and_the_others_go_on(capsys: pytest.CaptureFixture[str]):
    tried: list[str] = []

    def convert(source: str) -> ConvertReport:
        tried.append(source)
        raise ZeroDivisionError("nobody foresaw this")

    report = convert_each(["a.yaml", "b.yaml"], convert, ignore_events)
    assert tried == ["a.yaml", "b.yaml"]
    assert (report.code, [run.code for run in report.runs]) == (1, [1, 1])
    assert "ZeroDivisionError: nobody foresaw this" in capsys.readouterr().err


def test_a_signal_stops_them_all():
    tried: list[str] = []

    def convert(source: str) -> ConvertReport:
        tried.append(source)
        raise InterruptedRunError("told to stop")

    with pytest.raises(InterruptedRunError):
        convert_each(["a.yaml", "b.yaml"], convert, ignore_events)
    assert tried == ["a.yaml"]


def test_what_is_wrong_with_the_last_recipe_is_said_before_the_first_is_converted(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, typo, unmatched = recipe("good"), recipe("typo"), recipe("unmatched")
    typo.write_text(typo.read_text().replace("rank:", "ranks:"))
    unmatched.write_text(unmatched.read_text() + "layers: [{match: nowhere.*, rank: 32}]\n")
    second = recipe("second")
    second.write_text(good.read_text())
    events = tmp_path / "events.jsonl"
    files = [good, typo, unmatched, second]
    assert run(["convert", *map(str, files), "-q", "--events", str(events), "--device", "cpu"]) == 2
    told = [json.loads(line) for line in events.read_text().splitlines()]
    first_work = next(index for index, event in enumerate(told) if event["kind"] == "start")
    warned = [event["detail"] for event in told[:first_work]]
    assert "unknown key 'ranks'" in warned[0]
    assert "nowhere.*" in warned[1]
    assert f"is also an output of {good}" in warned[2]
    assert {event["job"] for event in told[first_work:]} == {"good"}
    assert (tmp_path / "out/good").is_dir()
    error = capsys.readouterr().err
    assert f"3 of 4 recipes failed: {typo}, {unmatched}, {second}" in error
    assert "table" not in error
