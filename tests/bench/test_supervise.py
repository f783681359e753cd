"""A rehearsal of kernels/measure.py on a device that faults, hangs, is killed and lies, in each stage in turn."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from svdq_cli.bench.supervise import Record, Stage, found_lines, supervise

ITEMS = ("first", "second", "third")
NAMES = ("probe", "largest", "self_test", "correctness", "speed")
STAGES = [Stage(name, item_seconds=0.6, least_seconds=0.1) for name in NAMES]

# After a fault nothing works in that process any more, as after an illegal address
DEVICE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from svdq_cli.bench.supervise import serve

stage, trouble, where, *over = sys.argv[1:]
broken = False

def item(name):
    def run():
        global broken
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield {{"us": 1.0, "ok": True}}
        if where == stage + "/" + name:
            if trouble == "fault":
                broken = True
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if trouble == "hang":
                time.sleep(60)
            if trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if trouble == "chatter":
                print("ptxas warning: something")
        yield {{"us": 2.0, "ok": trouble != "lie" or where != stage + "/" + name}}
    return name, run

if trouble == "no start" and where.startswith(stage + "/"):
    sys.exit(1)
sys.exit(serve([item(name) for name in {items!r}], over, to=sys.stdout))
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The measuring process of a device, as a script."""
    path = tmp_path_factory.mktemp("device") / "device.py"
    path.write_text(DEVICE.format(root=str(Path(__file__).resolve().parents[2]), items=ITEMS))
    return path


def rehearse(
    device: Path, folder: Path, trouble: str, where: str, *, budget: float = 60.0
) -> tuple[bool, list[dict]]:
    record = Record(folder / "measured.jsonl")
    sound = supervise(
        STAGES,
        lambda stage, over: [sys.executable, "-S", str(device), stage, trouble, where, *over],
        record,
        budget=budget,
        start_seconds=10.0,
        show=lambda line: None,
    )
    lines = list(found_lines(record.path))
    assert lines == record.lines
    return sound, lines


def figures(lines: list[dict]) -> set[tuple[str, str, float]]:
    return {(line["stage"], line["item"], line["us"]) for line in lines if "us" in line}


EVERYTHING = {(stage, item, us) for stage in NAMES for item in ITEMS for us in (1.0, 2.0)}


@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize(
    ("trouble", "said"),
    [("fault", "fault: RuntimeError: CUDA error"), ("hang", "hung: no word"), ("killed", "died: signal 9")],
)
def test_one_item_in_trouble_costs_its_own_figure_only(
    stage: str, trouble: str, said: str, device: Path, tmp_path: Path
):
    sound, lines = rehearse(device, tmp_path, trouble, f"{stage}/second")
    assert not sound
    assert figures(lines) == EVERYTHING - {(stage, "second", 2.0)}
    (problem,) = [line for line in lines if "problem" in line]
    assert (problem["stage"], problem["item"]) == (stage, "second")
    assert said in problem["problem"]


@pytest.mark.parametrize("stage", NAMES)
def test_a_device_that_lies_is_written_down_and_nothing_ends(stage: str, device: Path, tmp_path: Path):
    sound, lines = rehearse(device, tmp_path, "lie", f"{stage}/first")
    assert sound
    assert figures(lines) == EVERYTHING
    assert [(line["stage"], line["item"]) for line in lines if line.get("ok") is False] == [(stage, "first")]


@pytest.mark.parametrize("item", ITEMS)
def test_a_stage_that_never_starts_does_not_start_for_ever(item: str, device: Path, tmp_path: Path):
    sound, lines = rehearse(device, tmp_path, "no start", f"largest/{item}")
    assert not sound
    assert figures(lines) == {figure for figure in EVERYTHING if figure[0] != "largest"}


def test_what_else_a_process_prints_is_no_figure(device: Path, tmp_path: Path):
    sound, lines = rehearse(device, tmp_path, "chatter", "probe/first")
    assert sound
    assert figures(lines) == EVERYTHING


def test_a_budget_drops_the_tail_and_says_so(device: Path, tmp_path: Path):
    started = time.monotonic()
    sound, lines = rehearse(device, tmp_path, "hang", "probe/third", budget=0.5)
    assert not sound
    assert time.monotonic() - started < 5
    assert figures(lines) <= {("probe", item, us) for item in ITEMS for us in (1.0, 2.0)}
    assert [line["stage"] for line in lines if "left_out" in line] == list(NAMES[1:])
    assert any(line.get("problem") == "out of budget" for line in lines)


def test_a_figure_is_on_the_disk_before_the_next_item(tmp_path: Path):
    record = Record(tmp_path / "measured.jsonl")
    record.add({"us": 1.0})
    assert json.loads(record.path.read_text()) == {"us": 1.0}
    with record.path.open("a") as file:
        file.write('{"us": 2.0, "cut sho')
    assert list(found_lines(record.path)) == [{"us": 1.0}]
