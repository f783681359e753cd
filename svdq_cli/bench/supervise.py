"""Measurements that outlive what they measure: each stage runs in a process of its own, which a supervisor watches.

A fault of a GPU ends what its process can do there, and a hang ends nothing by itself. So a stage is a list of items,
such as one kernel on one shape. Its process says on its standard output which item begins, what it found, and that it
ended. After a fault, a hang or a death the supervisor notes the item, and a new process goes on behind it. Every line
is in the file before the next item begins.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Found = dict[str, Any]
Item = tuple[str, Callable[[], Iterable[Found]]]

START_SECONDS = 90.0  # to import torch and to make what the first item needs
FAULTED = 3  # how a process ends whose item raised: what the GPU holds afterwards is not to be trusted


@dataclass(frozen=True, slots=True)
class Stage:
    """`item_seconds`: after which an item hangs. `least_seconds`: with less of the budget left it is not begun."""

    name: str
    item_seconds: float
    least_seconds: float = 5.0


@dataclass(slots=True)
class Record:
    """The one file that everything found goes to, a JSON object a line."""

    path: Path
    lines: list[Found] = field(default_factory=list)

    def add(self, line: Found) -> None:
        """Appends, on the disk before anything else happens."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------ the measuring process


def serve(items: Iterable[Item], skipped: Sequence[str], *, to: TextIO) -> int:
    """Runs the items that are not skipped, one after the other, and tells of each. Ends behind the first that raises;
    returns the exit status."""

    def say(**line: object) -> None:
        to.write(json.dumps(line) + "\n")
        to.flush()

    done = set(skipped)
    for name, run in items:
        if name in done:
            continue
        say(begin=name)
        try:
            for found in run():
                say(found=found)
        except Exception as error:
            say(fault=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-3000:])
            return FAULTED
        say(end=name)
    return 0


# ------------------------------------------------------------------------------------------ the supervisor


def supervise(
    stages: Sequence[Stage],
    command: Callable[[str, Sequence[str]], Sequence[str]],
    record: Record,
    *,
    budget: float,
    start_seconds: float = START_SECONDS,
    show: Callable[[str], None] = print,
) -> bool:
    """Runs the stages in order within `budget` seconds; what does not fit is left out and said so. `command`: the words
    that run a stage's process, given the items to leave out. Returns whether every stage came to its end without a
    fault."""
    deadline = time.monotonic() + budget
    sound = True
    for stage in stages:
        left = deadline - time.monotonic()
        if left < stage.least_seconds:
            show(f"== {stage.name}: left out, {max(left, 0):.0f} s of the budget are left")
            record.add({"stage": stage.name, "left_out": "budget", "seconds_left": round(left, 1)})
            sound = False
            continue
        started = time.monotonic()
        ended = _Watch(stage, command, record, deadline, start_seconds, show).run()
        seconds = round(time.monotonic() - started, 1)
        record.add({"stage": stage.name, "ended": ended, "seconds": seconds})
        show(f"== {stage.name}: {seconds:.0f} s{'' if ended else ', not all of it'}")
        sound = sound and ended
    return sound


@dataclass(slots=True)
class _Watch:
    """One stage, in as many processes as its faults make necessary."""

    stage: Stage
    command: Callable[[str, Sequence[str]], Sequence[str]]
    record: Record
    deadline: float
    start_seconds: float
    show: Callable[[str], None]
    over: list[str] = field(default_factory=list)  # items that ended, or that ended a process
    current: str | None = None

    def run(self) -> bool:
        sound = True
        while True:
            before = len(self.over)
            problem = self._process()
            if problem is None:
                return sound
            sound = False
            self._note(problem)
            if time.monotonic() >= self.deadline or len(self.over) == before:
                return False  # no time, or a process that ends before its first item

    def _note(self, problem: Found) -> None:
        line = {"stage": self.stage.name, "item": self.current, **problem}
        self.record.add(line)
        self.show(f"  {self.current or self.stage.name}: {problem['problem']}")
        if self.current is not None:
            self.over.append(self.current)
            self.current = None

    def _process(self) -> Found | None:
        """Runs one process to its end. Returns what was wrong with it."""
        self.current = None
        process = subprocess.Popen(
            [*self.command(self.stage.name, self.over)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that what it started ends with it
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            return self._follow(process, lines)
        finally:
            _end(process)

    def _follow(self, process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> Found | None:
        limit = self.start_seconds
        until = min(time.monotonic() + limit, self.deadline)
        while True:
            try:
                line = lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                late = time.monotonic() >= self.deadline
                return {"problem": "out of budget" if late else f"hung: no word for {limit:g} s"}
            if line is None:
                status = process.wait()
                return None if status == 0 else {"problem": f"the process died: {_how(status)}"}
            if fault := self._take(line):
                return fault
            limit = self.stage.item_seconds if self.current else self.start_seconds
            until = min(time.monotonic() + limit, self.deadline)

    def _take(self, text: str) -> Found | None:
        """One line of the process: noted, or a fault."""
        try:
            line = json.loads(text)
        except ValueError:
            self.show(f"  {text.rstrip()[:400]}")
            return None
        match line:
            case {"begin": str(name)}:
                self.current = name
            case {"found": dict(found)}:
                self.record.add({"stage": self.stage.name, "item": self.current, **found})
                self.show(f"  {self.current}: {json.dumps(found)[:300]}")
            case {"fault": fault, "trace": trace}:
                return {"problem": f"fault: {fault}", "trace": trace}
            case {"end": str(name)}:
                self.over.append(name)
                self.current = None
            case _:
                self.show(f"  {text.rstrip()[:400]}")
        return None


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def found_lines(path: Path) -> Iterator[Found]:
    """What a record holds. A last line that was cut short is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
