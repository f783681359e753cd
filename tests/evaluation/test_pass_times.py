"""Times of passes, and when they say nothing of the model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from svdq_cli.evaluation.pass_times import PassTime, note_time, start_clock, time_of


def test_times_add_up_over_runs(tmp_path: Path):
    assert time_of(tmp_path, "16bit") is None
    note_time(tmp_path, "16bit", images=1, seconds=4.0, processor_seconds=6.0, working_seconds=3.0)
    note_time(tmp_path, "16bit", images=2, seconds=2.0, processor_seconds=3.0, working_seconds=1.5)
    assert time_of(tmp_path, "16bit") == PassTime(2.0, 3.0, 1.5)


def test_the_processors_time_is_unknown_where_one_run_did_not_note_it(tmp_path: Path):
    (tmp_path / "times.json").write_text('{"16bit": {"pictures": 1, "seconds": 4.0}}')
    assert time_of(tmp_path, "16bit") == PassTime(4.0)
    note_time(tmp_path, "16bit", images=1, seconds=2.0, processor_seconds=2.0, working_seconds=2.0)
    assert time_of(tmp_path, "16bit") == PassTime(3.0)


@pytest.mark.parametrize(
    ("taken", "busy"),
    [
        (PassTime(1.0, processor=1.0, working=1.0), False),
        # four threads, each of them all the time
        (PassTime(1.0, processor=4.0, working=1.0), False),
        # four threads that shared their processors with other programs
        (PassTime(2.0, processor=4.0, working=1.0), True),
        # a GPU's: the thread waits for it
        (PassTime(2.0, processor=0.5), None),
    ],
)
def test_a_machine_was_busy_where_the_sampling_thread_waited(taken: PassTime, busy: bool | None):
    assert taken.was_busy is busy


def test_waiting_counts_as_wall_time_alone_and_only_on_a_cpu(tmp_path: Path):
    """Sleep stands for a processor that works for another program."""
    on_cpu, on_gpu = (start_clock(torch.device(name)) for name in ("cpu", "cuda"))
    time.sleep(0.05)
    on_cpu.note(tmp_path, "16bit", images=1)
    on_gpu.note(tmp_path, "converted", images=1)
    waited, beside = time_of(tmp_path, "16bit"), time_of(tmp_path, "converted")
    assert waited is not None
    assert waited.wall >= 0.05
    assert waited.was_busy
    assert beside is not None
    assert beside.was_busy is None


def test_work_of_one_thread_is_not_waiting(tmp_path: Path):
    clock = start_clock(torch.device("cpu"))
    started = time.thread_time()
    while time.thread_time() - started < 0.05:
        pass
    clock.note(tmp_path, "16bit", images=1)
    taken = time_of(tmp_path, "16bit")
    assert taken is not None
    assert taken.working is not None
    assert taken.working == pytest.approx(0.05, rel=0.5)
    assert taken.processor is not None
    assert taken.processor >= taken.working * 0.99
