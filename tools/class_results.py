"""What was found out about every class of diffusers, and docs/families/classes.md, which is written from it.

Results are kept in tools/class_results.json as soon as there are any, and a list of what is done beside it while a run
lasts, so that a run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from tools.model_class_facts import WITHOUT_PIPELINE

PAGE = Path(__file__).parents[1] / "docs/families/classes.md"
RESULTS = Path(__file__).with_name("class_results.json")
_SECONDS = 900  # that one piece of work may take


@dataclass(frozen=True, slots=True)
class Result:
    """What is known of a class. Empty where it was not tried."""

    plan: str = ""  # "seen", "by names", "family flux", or "none" for a class that is refused
    parameters: int = 0
    w4a4: int = 0
    w4a16: int = 0
    kept: int = 0
    wrong: tuple[str, ...] = ()
    ratio: float = 0.0
    note: str = ""
    data_free: str = ""  # "ok", or why not
    calibrated: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # by tiny pipeline: "ok", or why not

    @property
    def is_calibrated(self) -> bool:
        return bool(self.calibrated) and all(said == "ok" for said in self.calibrated.values())

    @property
    def is_fine(self) -> bool:
        """Whether nothing that was tried went wrong."""
        return self.data_free in ("", "ok") and (self.is_calibrated or not self.calibrated)


def known() -> dict[str, Result]:
    """The results so far, by class."""
    if not RESULTS.is_file():
        return {}
    found = json.loads(RESULTS.read_text())
    return {name: Result(**{**each, "wrong": tuple(each["wrong"])}) for name, each in found.items()}


def keep(name: str, **found: Any) -> None:
    """Replace what is known of a class by `found`, and write the page anew."""
    results = known()
    results[name] = replace(results.get(name, Result()), **found)
    text = json.dumps({name: asdict(each) for name, each in sorted(results.items())}, indent=1)
    RESULTS.write_text(f"{text}\n")
    PAGE.write_text(page(results))


def each_in_a_process(
    names: Sequence[str],
    work: Callable[[str], Any],
    done: Callable[[str, Any], None],
    *,
    jobs: int,
    run: str | None = None,
) -> list[str]:
    """`work` of every name in a process of its own, and `done` of what it returned in this one. Returns the names whose
    work raised or did not end; `done` gets the error's text for them.

    A run with a name that was stopped goes on: what it had done is left out.
    """
    unfinished = RESULTS.with_name(f".{run}.unfinished") if run else None
    left = [name for name in names if name not in _done_before(unfinished)]
    if len(left) < len(names):
        print(f"{run}: goes on where it stopped, {len(left)} of {len(names)} are left", file=sys.stderr)
    failed: list[str] = []
    running: dict[Connection, tuple[str, ForkProcess, float]] = {}
    while left or running:
        while left and len(running) < jobs:
            _start(left.pop(0), work, running)
        wait(list(running), timeout=5)
        for end, (name, process, started) in list(running.items()):
            late = time.monotonic() - started > _SECONDS
            if not (end.poll() or late or not process.is_alive()):
                continue
            del running[end]
            found, error = _outcome(end, late)
            process.kill()
            process.join()
            failed += [name] if error else []
            done(name, error or found)
            print(f"{name}: {error or found}", file=sys.stderr, flush=True)
            if unfinished:
                with unfinished.open("a") as file:
                    file.write(f"{name}\n")
    if unfinished:
        unfinished.unlink(missing_ok=True)
    return failed


def _done_before(unfinished: Path | None) -> list[str]:
    return unfinished.read_text().split() if unfinished and unfinished.is_file() else []


def _start(
    name: str, work: Callable[[str], Any], running: dict[Connection, tuple[str, ForkProcess, float]]
) -> None:
    context = multiprocessing.get_context("fork")
    end, other = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(other, work, name))
    process.start()
    other.close()
    running[end] = (name, process, time.monotonic())


def _work(end: Connection, work: Callable[[str], Any], name: str) -> None:
    try:
        end.send((work(name), ""))
    except Exception as error:  # whatever one class raises, the others have their turn
        traceback.print_exc()
        said = " ".join(str(error).split())
        end.send((None, f"{type(error).__name__}: {said}"))


def _outcome(end: Connection, late: bool) -> tuple[Any, str]:
    try:
        if end.poll():
            return end.recv()
    except EOFError:
        pass
    return None, f"did not end in {_SECONDS // 60} minutes" if late else "its process was killed"


def page(results: Mapping[str, Result]) -> str:
    """The page of docs of these results."""
    import diffusers

    rows = {name: each for name, each in sorted(results.items()) if each.plan}
    plans = [each.plan for each in rows.values()]
    families = sum(plan.startswith("family") for plan in plans)
    wrong = sum(len(each.wrong) for each in rows.values())
    converted = sum(each.data_free == "ok" for each in rows.values())
    calibrated = sum(each.is_calibrated for each in rows.values())
    pipelines = sum(said == "ok" for each in rows.values() for said in each.calibrated.values())
    lines = [
        "# Every class of diffusers",
        "",
        f"All {len(rows)} transformer and UNet classes of diffusers {diffusers.__version__} with their default config "
        "(where it lacks values, those of a published model), planned from a bare `config.json` for int4, rank 32, "
        f"format `nunchaku-lite`. {plans.count('seen')} plans were seen in a forward pass, {families} follow a family "
        f"file, {plans.count('by names')} rest on names alone, {plans.count('none')} classes are refused. Wrong "
        f"choices: {wrong}.",
        "",
        "Written by `make classes`. *Wrong* counts layers of blocks whose role is not the one that the class's source "
        "calls for (`tools/model_class_facts.py`); the note says what stays at 16 bits, as `svdq inspect` does.",
        "",
        "*Data-free* and *calibrated* are what `make pipelines` found: a small model of the class "
        "(`tools/model_class_sizes.py`) with random weights was converted without calibration and checked "
        f"({converted} of {len(rows)}); tiny pipelines of it (`tests/tiny_pipelines`) were calibrated, converted, "
        f"checked, and have generated ({calibrated} classes, {pipelines} pipelines; the column says why not).",
        "",
        "| class | plan | B params | W4A4 / W4A16 / kept | wrong | ratio | data-free | calibrated | note |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(name, each) for name, each in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, result: Result) -> str:
    note = "; ".join([*result.wrong[:2], result.note] if result.note else result.wrong[:2])
    planned = ("", "", "", "")
    if result.plan == "none":
        note = f"refused: {note}"
    else:
        counts = f"{result.w4a4} / {result.w4a16} / {result.kept}"
        planned = (f"{result.parameters / 1e9:.2f}", counts, str(len(result.wrong)), f"{result.ratio:.2f}")
    cells = (name, result.plan, *planned, result.data_free, _calibrated(name, result), note)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _calibrated(name: str, result: Result) -> str:
    fine = [pipeline for pipeline, said in result.calibrated.items() if said == "ok"]
    rest = [f"{pipeline}: {said}" for pipeline, said in result.calibrated.items() if said != "ok"]
    return "; ".join([f"ok ({', '.join(fine)})"] * bool(fine) + rest) or WITHOUT_PIPELINE.get(
        name, "not tried"
    )
