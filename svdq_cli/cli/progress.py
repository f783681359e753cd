"""Progress for people: bars with ETA on a terminal, plain lines otherwise. And for machines: JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from svdq_cli.errors import UsageError
from svdq_cli.parallel import ALONE, Team
from svdq_cli.printable import printable
from svdq_cli.records import Event, Observer

PLAIN_INTERVAL = 5.0  # seconds between plain lines of one stage


@contextmanager
def progress(*, quiet: bool, verbose: bool, events: Path | None, team: Team = ALONE) -> Iterator[Observer]:
    """An observer that shows events on stderr and writes them to `events`; of a team, the first process alone does."""
    with ExitStack() as stack:
        observers: list[Observer] = []
        if not team.leads:
            quiet, events = True, None
        if events is not None:
            observers.append(_json_lines(stack.enter_context(_opened(events))))
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
    with file:
        yield file


def _json_lines(file: TextIO) -> Observer:
    started = time.monotonic()

    def observe(event: Event) -> None:
        file.write(json.dumps({"at": round(time.monotonic() - started, 3), **asdict(event)}) + "\n")
        file.flush()

    return observe


def _plain_lines(*, verbose: bool) -> Observer:
    shown: dict[str, float] = {}

    def observe(event: Event) -> None:
        now = time.monotonic()
        match event.kind:
            case "warning":
                _say(f"warning: {event.detail}")
            case "note":
                _say(f"{event.stage}: {event.detail}")
            case "start":
                shown[event.stage] = now
            case "end":
                took = f" in {event.seconds:.1f} s" if event.seconds is not None else ""
                _say(f"{event.stage}: done{took}")
            case "advance":
                if verbose or now - shown.get(event.stage, now) >= PLAIN_INTERVAL:
                    shown[event.stage] = now
                    detail = f"  {event.detail}" if event.detail else ""
                    _say(f"{event.stage}: {event.done}/{event.total}{_eta(event)}{detail}")

    return observe


@contextmanager
def _bars() -> Iterator[Observer]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bars:

        def observe(event: Event) -> None:
            if event.kind == "warning":
                text = Text("warning: ", style="yellow").append(printable(event.detail), style="default")
                bars.console.print(text)
                return
            if event.kind == "note":
                bars.console.print(Text(printable(f"{event.stage}: {event.detail}")))
                return
            if event.kind == "start" or event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total or None, detail="")
            detail = "" if event.kind == "end" else escape(printable(event.detail))
            bars.update(tasks[event.stage], completed=event.done, total=event.total or None, detail=detail)

        yield observe


def _eta(event: Event) -> str:
    if not event.seconds or not event.done or event.done >= event.total:
        return ""
    return f", {event.seconds / event.done * (event.total - event.done):.0f} s left"


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
