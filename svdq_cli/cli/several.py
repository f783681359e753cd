"""Several recipes in one command: each is tried, whatever became of those before it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from svdq_cli.cli.failures import FailureReport, bug_report, failure_report
from svdq_cli.errors import SEVERITY, GateMissedError, InterruptedRunError, UsageError, stopped
from svdq_cli.records import Event, Observer
from svdq_cli.reports import ConvertReport, PlanReport


@dataclass(frozen=True, slots=True)
class RecipeRun:
    """What became of one recipe: its exit code, and the object that it alone would have printed."""

    source: str
    code: int
    report: ConvertReport | PlanReport | FailureReport


@dataclass(frozen=True, slots=True)
class SeveralReport:
    """What became of all of them. `code` is the worst of theirs, and the command's."""

    status: str
    code: int
    runs: tuple[RecipeRun, ...]
    command: str = "convert"
    schema: int = 1


def require_recipes(sources: Sequence[str], **options: object) -> None:
    """UsageError where several sources are given and one is not a recipe, or for options that mean one conversion."""
    from svdq_cli.prepare.from_command_line import recipe_file

    for source in sources:
        if recipe_file(source) is None:
            raise UsageError(
                f"{source}: each of several sources must be a recipe (.yaml)",
                hint="quote a path with spaces; convert models one by one, or write recipes with svdq init",
                where=source,
            )
    given = ", ".join(name for name, value in options.items() if value is not None)
    if given:
        raise UsageError(
            f"{given}: applies to a single conversion, but several recipes are given",
            hint="leave it out: each recipe names its own outputs and calibration",
        )


def convert_each(
    sources: Sequence[str],
    convert: Callable[[str], ConvertReport | PlanReport],
    observe: Observer,
    *,
    check: Callable[[str], object] = lambda source: None,
) -> SeveralReport:
    """Run `check` on every recipe, and then `convert` on those that pass: what is wrong with the last is said before
    the first is converted. Ctrl-C and SIGTERM stop them all."""
    refused: dict[int, RecipeRun] = {}
    for index, source in enumerate(sources):
        if run := _checked(source, check):
            refused[index] = run
            _tell(run, observe)
    runs: list[RecipeRun] = []
    for index, source in enumerate(sources):
        if index in refused:
            runs.append(refused[index])
            continue
        runs.append(_run(source, convert))
        _tell(runs[-1], observe)
    code = max((run.code for run in runs), key=SEVERITY.index)
    return SeveralReport({0: "ok", 6: "gate-missed"}.get(code, "error"), code, tuple(runs))


def refuse_second_writer(path: Path, source: str, writers: dict[Path, str]) -> None:
    """UsageError where an earlier recipe writes there too. Notes the path in `writers`."""
    first = writers.setdefault(path.absolute(), source)
    if first != source:
        raise UsageError(
            f"{source}: {path} is also an output of {first}",
            hint="give each recipe its own output",
            where=source,
            kind="output-exists",
        )


def job_names(sources: Sequence[str]) -> dict[str, str]:
    """What progress calls each recipe: its file's name, or all of its path where two are called the same."""
    names = [PurePath(source).stem for source in sources]
    return {
        source: source if names.count(name) > 1 else name for source, name in zip(sources, names, strict=True)
    }


def named(observe: Observer, job: str) -> Observer:
    """The observer of one of several conversions: every event says which."""
    return lambda event: observe(replace(event, job=job))


def said_of(source: str, message: str) -> str:
    """A recipe's message with its name in front, which most messages begin with themselves."""
    return message if message.startswith(source) else f"{source}: {message}"


def _tell(run: RecipeRun, observe: Observer) -> None:
    if isinstance(run.report, FailureReport):
        observe(Event("warning", "convert", detail=said_of(run.source, run.report.error.message)))


def _checked(source: str, check: Callable[[str], object]) -> RecipeRun | None:
    """The failure of a recipe that no conversion could begin with; None for any other. A bug is left to the run."""
    try:
        check(source)
    except InterruptedRunError:
        raise
    except Exception as error:
        refusal = stopped(error)
        return RecipeRun(source, refusal.code, failure_report(refusal, "convert")) if refusal else None
    return None


def _run(source: str, convert: Callable[[str], ConvertReport | PlanReport]) -> RecipeRun:
    try:
        report = convert(source)
    except InterruptedRunError:
        raise
    except Exception as error:
        refusal = stopped(error)
        if refusal is not None:
            return RecipeRun(source, refusal.code, failure_report(refusal, "convert"))
        traceback.print_exc(file=sys.stderr)
        return RecipeRun(source, 1, bug_report(error, "convert"))
    return RecipeRun(source, _code_of(report), report)


def _code_of(report: ConvertReport | PlanReport) -> int:
    if isinstance(report, PlanReport):
        return report.error.code if report.error else 0
    return GateMissedError.code if report.gates_missed else 0
