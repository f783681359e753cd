"""Progress for people: bars with ETA on a terminal, plain lines otherwise. And for machines: JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from svdq_cli.errors import UsageError
from svdq_cli.records import Event, Observer
from svdq_cli.system.distributed import ALONE, Team
from svdq_cli.text import printable

PLAIN_INTERVAL = 5.0  # seconds between plain lines of one stage
MARGIN = 4  # columns that bars leave free
UNITS = {  # what a stage counts, by the first word of its name
    "encode": "prompts",
    "calibrate": "image steps",
    "record": "image steps",
    "generate": "image steps",
    "allocate": "layer groups",
    "solve": "layers",
    "reconstruct": "steps",
    "output": "blocks",
    "pack": "outputs",
    "encoder": "layers",
    "check": "layers",
    "score": "images",
    "push": "files",
    "bench": "shapes",
}


@contextmanager
def progress(*, quiet: bool, verbose: bool, events: Path | None, team: Team = ALONE) -> Iterator[Observer]:
    """An observer that shows events on stderr and writes them to `events`; of a team, the first process alone does."""
    with ExitStack() as stack:
        observers: list[Observer] = []
        if not team.leads:
            quiet, events = True, None
        if events is not None:
            observers.append(_json_lines(stack.enter_context(_opened(events)), events))
        if not quiet:
            bars = sys.stderr.isatty()
            observers.append(stack.enter_context(_bars()) if bars else _plain_lines(verbose=verbose))

        def observe(event: Event) -> None:
            for observer in observers:
                observer(event)

        yield observe


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: can't write events there: {error.strerror}", where=str(path)) from error
    try:
        yield file
    finally:
        with suppress(OSError):  # of what could not be written, which was said
            file.close()


def _json_lines(file: TextIO, path: Path) -> Observer:
    """The work counts more than its log: where that can't be written any more, stderr says so, once."""
    started = time.monotonic()
    lost = False

    def observe(event: Event) -> None:
        nonlocal lost
        if lost:
            return
        try:
            file.write(json.dumps({"at": round(time.monotonic() - started, 3), **asdict(event)}) + "\n")
            file.flush()
        except OSError as error:
            lost = True
            _say(f"warning: {path}: events are no longer written there: {error.strerror}")

    return observe


class Pace:
    """How long each stage still takes, by what this run has done of it: what an earlier run left counts for nothing."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[int, float]] = {}  # by stage: what was done when it began, and when

    def seconds_left(self, event: Event, now: float) -> float | None:
        """Seconds until the stage ends; None before anything was done, and at the end."""
        stage = _title(event)
        if event.kind == "start" or stage not in self._began:
            self._began[stage] = event.done, now
            return None
        first, began = self._began[stage]
        if event.seconds is None:  # what was taken over from an earlier run
            self._began[stage] = event.done, now
            return None
        if event.done <= first or event.done >= event.total:
            return None
        return (now - began) / (event.done - first) * (event.total - event.done)


def _title(event: Event) -> str:
    """The stage, after the recipe where there are several."""
    return f"{event.job}: {event.stage}" if event.job else event.stage


def _units(event: Event) -> str:
    """What the stage counts."""
    first = event.stage.split(" ")[0]
    return UNITS.get(first, "")


def duration_text(seconds: float) -> str:
    """A duration as text: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _plain_lines(*, verbose: bool) -> Observer:
    shown: dict[str, float] = {}
    pace = Pace()

    def observe(event: Event) -> None:
        now = time.monotonic()
        title = _title(event)
        left = pace.seconds_left(event, now)
        match event.kind:
            case "warning":
                _say(f"{event.job}: warning: {event.detail}" if event.job else f"warning: {event.detail}")
            case "note":
                _say(f"{title}: {event.detail}")
            case "start":
                shown[title] = now
            case "end":
                took = f" in {event.seconds:.1f} s" if event.seconds is not None else ""
                of = f" {event.detail}" if event.detail else ""
                _say(f"{title}{of}: done{took}")
            case "advance":
                if verbose or now - shown.get(title, now) >= PLAIN_INTERVAL:
                    shown[title] = now
                    eta = f", {duration_text(left)} left" if left is not None else ""
                    units = f" {_units(event)}" if _units(event) else ""
                    detail = f"  {event.detail}" if event.detail else ""
                    _say(f"{title}: {event.done}/{event.total}{units}{eta}{detail}")

    return observe


@contextmanager
def _bars() -> Iterator[Observer]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskID, TextColumn
    from rich.table import Column
    from rich.text import Text

    console = Console(stderr=True)
    # A line that fills the terminal would be broken by the ^C that it echoes, and be left there twice
    console.width = max(20, console.width - MARGIN)
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16 if console.width >= 80 - MARGIN else 6),
        TextColumn("{task.fields[counted]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[times]}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    tasks: dict[str, TaskID] = {}
    began: dict[str, float] = {}
    pace = Pace()
    with Progress(*columns, console=console, expand=True) as bars:

        def observe(event: Event) -> None:
            now, title = time.monotonic(), _title(event)
            if event.kind == "warning":
                before = f"{event.job}: warning: " if event.job else "warning: "
                text = Text(before, style="yellow").append(printable(event.detail), style="default")
                bars.console.print(text)
                return
            if event.kind == "note":
                bars.console.print(Text(printable(f"{title}: {event.detail}")))
                return
            left = pace.seconds_left(event, now)
            if event.kind == "start" or title not in tasks:
                began[title] = now
                tasks[title] = bars.add_task(
                    escape(title), total=event.total or None, detail="", counted="", times=""
                )
            detail = "" if event.kind == "end" else escape(printable(event.detail))
            counted = f"{event.done}/{event.total} {_units(event)}".rstrip() if event.total else ""
            elapsed = duration_text(now - began[title])
            times = f"{duration_text(left)} left, {elapsed} so far" if left is not None else ""
            if event.kind == "end":
                times = f"took {elapsed}"
            bars.update(
                tasks[title],
                completed=event.done,
                total=event.total or None,
                detail=detail,
                counted=escape(counted),
                times=times,
            )

        yield observe


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
