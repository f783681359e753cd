"""What a run says while it works: labelled times, units, an ETA by what this run has done, and which recipe it is."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from svdq_cli.cli import progress as shown
from svdq_cli.cli.progress import Pace, duration_text, progress
from svdq_cli.cli.several import job_names, named
from svdq_cli.records import Event


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `progress` reads; tests move it."""
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    return now


def test_the_eta_of_a_resumed_run_counts_what_this_run_has_done():
    pace = Pace()
    assert pace.seconds_left(Event("start", "solve", 90, 100), 0.0) is None
    assert pace.seconds_left(Event("advance", "solve", 91, 100, seconds=10.0), 10.0) == pytest.approx(90.0)
    assert pace.seconds_left(Event("advance", "solve", 100, 100, seconds=100.0), 100.0) is None


def test_layers_that_were_taken_over_at_once_are_no_pace():
    pace = Pace()
    pace.seconds_left(Event("start", "solve", 0, 100), 0.0)
    assert pace.seconds_left(Event("advance", "solve", 50, 100), 0.1) is None  # taken over: without seconds
    assert pace.seconds_left(Event("advance", "solve", 60, 100, seconds=10.0), 10.1) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations_are_written_for_people(seconds: float, text: str):
    assert duration_text(seconds) == text


def test_plain_lines_say_units_and_times_and_name_the_recipe(
    clock: list[float], capsys: pytest.CaptureFixture[str]
):
    with progress(quiet=False, verbose=False, events=None) as observe:
        told = named(observe, "flux-int4")
        told(Event("note", "prompts", detail="2 prompts from p.txt"))
        told(Event("start", "calibrate", 0, 512))
        clock[0] = 10.0
        told(Event("advance", "calibrate", 128, 512, seconds=10.0))
        told(Event("end", "calibrate", 512, 512, seconds=40.0))
        observe(Event("warning", "convert", detail="of no recipe"))
    assert capsys.readouterr().err.splitlines() == [
        "flux-int4: prompts: 2 prompts from p.txt",
        "flux-int4: calibrate: 128/512 image steps, 30 s left",
        "flux-int4: calibrate: done in 40.0 s",
        "warning: of no recipe",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bars_fit_the_terminal_with_room_for_what_it_echoes(
    width: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
):
    """^C at the end of a full line breaks it, and the bar would be left there twice."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in {"COLUMNS": str(width), "LINES": "24", "TERM": "dumb", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with progress(quiet=False, verbose=False, events=None) as observe:
        observe(Event("start", "solve", 0, 1000))
        clock[0] = 100.0
        observe(Event("advance", "solve", 500, 1000, "transformer_blocks.0.attn.to_q " * 5, seconds=100.0))
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "solve" in line]
    assert lines
    from rich.text import Text

    assert max(Text.from_ansi(line).cell_len for line in lines) <= width - 3
    if width >= 80:
        assert "500/1000 layers" in stream.getvalue()
    if width >= 200:
        assert "1 min 40 s left, 1 min 40 s so far" in stream.getvalue()


def test_events_carry_the_recipe_that_they_are_of(tmp_path: Path):
    import json

    path = tmp_path / "events.jsonl"
    with progress(quiet=True, verbose=False, events=path) as observe:
        named(observe, "a")(Event("start", "solve", 0, 3))
        observe(Event("start", "solve", 0, 3))
    assert [json.loads(line)["job"] for line in path.read_text().splitlines()] == ["a", ""]


def test_recipes_of_one_name_are_called_by_their_paths():
    assert job_names(["x/a.yaml", "b.yaml"]) == {"x/a.yaml": "a", "b.yaml": "b"}
    assert job_names(["x/a.yaml", "y/a.yaml"]) == {"x/a.yaml": "x/a.yaml", "y/a.yaml": "y/a.yaml"}
