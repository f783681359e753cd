"""Several processes at one conversion: the bytes of one, and a clear end when one of them dies."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from svdq_cli.cli import run
from svdq_cli.errors import InterruptedRunError
from svdq_cli.records import Int4, Linear, SharedInput, SolveSettings, W4A4Plan
from svdq_cli.solve.costs import NOMINAL, solve_work
from svdq_cli.system.distributed import ALONE, JoinedTeam

CALIBRATION = [
    "--prompts",
    "prompts.txt",
    "--samples",
    "3",
    "--steps",
    "2",
    "--width",
    "16",
    "--height",
    "16",
]


def _environment(rank: int, port: int) -> dict[str, str]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def _free_port() -> int:
    # below those that a system hands out by itself, so that no other socket takes it before the process binds it
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("no free port")


def _start(arguments: list[str], folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "svdq_cli", *arguments, "--device", "cpu"],
        cwd=folder,
        env=_environment(rank, port) | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo cats\na small blue square\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_processes_write_the_bytes_of_one(tiny_flux: Path, folder: Path):
    # every stage that processes share or wait for: pictures, ranks, layers
    convert = ["convert", str(tiny_flux), *CALIBRATION, "--rank", "auto", "--format", "comfy"]
    assert run([*convert, "-o", "one", "--device", "cpu", "-q"]) == 0
    port = _free_port()
    processes = [_start([*convert, "-o", "two"], folder, rank, port) for rank in (0, 1)]
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[1][0] == "", "one report, from the first process"
    assert (folder / "two").read_bytes() == (folder / "one").read_bytes()


def test_a_killed_process_ends_the_other_with_work_to_go_on_with(tiny_flux: Path, folder: Path):
    convert = ["convert", str(tiny_flux), *CALIBRATION, "--effort", "balanced", "-o", "out"]
    port = _free_port()
    first, second = (_start(convert, folder, rank, port) for rank in (0, 1))
    layers = folder / ".out.work" / "layers"
    while first.poll() is None and not list(layers.glob("*.safetensors")):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)  # the store goes with it
    first.communicate()
    _, said = second.communicate(timeout=200)
    assert second.returncode == 75
    assert "process 0 of 2" in said
    solved = len(list(layers.glob("*.safetensors")))
    assert run([*convert, "--resume", "--device", "cpu", "-q"]) == 0
    report = json.loads((folder / "out" / "svdq_report.json").read_text())
    assert report["layers_taken_over"] >= solved > 0


# ------------------------------------------------------------------------------------------------- teams


@pytest.fixture
def team() -> tuple[JoinedTeam, JoinedTeam]:
    store = dist.HashStore()
    return JoinedTeam(0, 2, store=store, lost_after=0.3), JoinedTeam(1, 2, store=store, lost_after=0.3)


def test_items_are_claimed_once(team: tuple[JoinedTeam, JoinedTeam]):
    first, second = (member.claims("layers", "abcde") for member in team)
    assert [next(first), next(second), next(second), next(first), next(second)] == list("abcde")
    assert list(first) == list(second) == []


def test_a_process_alone_claims_everything():
    assert list(ALONE.claims("layers", "abc")) == list("abc") == list(ALONE.share("abc"))


def test_a_silent_process_is_lost(team: tuple[JoinedTeam, JoinedTeam]):
    team[1].store.set("beat/1", "machine7, process id 12 1")
    with pytest.raises(InterruptedRunError, match=r"process 1 of 2 \(machine7, process id 12\)") as caught:
        team[0].gather("layers")
    assert caught.value.kind == "process-lost"


def test_a_failed_process_ends_the_others_with_its_reason(team: tuple[JoinedTeam, JoinedTeam]):
    team[1].store.set("failed/1", "the disk is full")
    with pytest.raises(InterruptedRunError, match="process 1 of 2 failed: the disk is full"):
        team[0].gather("layers")


def test_a_process_that_is_done_and_left_is_not_missed(team: tuple[JoinedTeam, JoinedTeam]):
    team[1].done("layers")
    team[1].store.set("left/1", "")
    team[0].gather("layers")
    time.sleep(0.4)
    team[0].gather("layers")


# ------------------------------------------------------------------------------------------------- costs


def _cost(n: int, k: int, *, rows: int) -> float:
    plan = W4A4Plan(Linear("a", k, n, bias=True), Int4(), 32)
    settings = SolveSettings("grid", 0, torch.bfloat16, ("learned", "gptq", "scales", "refit"))
    return NOMINAL.seconds(solve_work(SharedInput("a", ("a",), (("a",),)), {"a": plan}, settings, rows=rows))


def test_wide_layers_cost_more():
    assert _cost(3072, 12288, rows=4096) > _cost(12288, 3072, rows=4096) > _cost(3072, 3072, rows=4096)
    assert _cost(3072, 3072, rows=4096) > _cost(3072, 3072, rows=0)
