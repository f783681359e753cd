"""Reports as JSON for scripts or as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from svdq_cli.cli.failures import print_failure
from svdq_cli.cli.pages import bench, conversion, demo, evaluation, inspect
from svdq_cli.cli.pages.shared import generated_text, loras_text, typed
from svdq_cli.cli.several import SeveralReport
from svdq_cli.cli.streams import printing
from svdq_cli.errors import CheckFailedError, GateMissedError, SvdqError
from svdq_cli.reports import (
    CalibrateReport,
    CheckReport,
    ConvertReport,
    ErrorFacts,
    EvalPlanReport,
    EvalReport,
    GenerateReport,
    InspectReport,
    LoraReport,
    PlanReport,
    RepackReport,
    json_text,
)
from svdq_cli.text import bytes_text, counted, printable_record

if TYPE_CHECKING:
    from svdq_cli.bench.report import BenchReport
    from svdq_cli.entrypoints.demo import DemoReport, ExportReport
    from svdq_cli.entrypoints.demo_lora import LoraDemoReport
    from svdq_cli.entrypoints.doctor import DoctorReport
    from svdq_cli.entrypoints.init import InitReport, RecipesReport
    from svdq_cli.entrypoints.push import PushReport


_USUAL, _WIDEST = 80, 10_000  # columns


def show(report: object, *, json: bool, verbose: bool = False) -> None:
    """The report on stdout."""
    with printing():
        if json:
            print(json_text(report))
        else:
            _show_page(report, verbose)


class _Page(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """A table that has no room is printed as wide as its names and figures are: rich would cut those off."""
        width = self.width
        try:
            for table in objects:
                if isinstance(table, Table):
                    unlimited = self.options.update(max_width=_WIDEST)
                    needed = Measurement.get(self, unlimited, table).minimum + len(table.columns)
                    self.width = max(self.width, needed if needed <= width else max(needed, _USUAL))
            super().print(*objects, **options)
        finally:
            self.width = width

    def on_broken_pipe(self) -> None:
        """rich would end the process, with an exit code of its own."""
        raise BrokenPipeError


def _show_page(report: object, verbose: bool) -> None:
    console = _Page(highlight=False, soft_wrap=True, markup=False, emoji=False)
    report = printable_record(report)
    match report:
        case ConvertReport():
            conversion.conversion(console, report, verbose)
        case PlanReport():
            conversion.plan(console, report)
        case SeveralReport():
            conversion.several(console, report)
        case CalibrateReport():
            conversion.calibration(console, report)
        case RepackReport():
            conversion.repacking(console, report)
        case LoraReport():
            conversion.lora(console, report, verbose)
        case InspectReport():
            inspect.inspection(console, report, verbose)
        case CheckReport():
            evaluation.check(console, report, verbose)
        case EvalPlanReport():
            evaluation.evaluation_plan(console, report)
        case EvalReport():
            evaluation.evaluation(console, report, verbose)
        case GenerateReport():
            console.print(f"{report.path}: {generated_text(report)}, {report.seconds:.1f} s")
            if report.loras:
                console.print(f"LoRAs: {loras_text(report.loras)}")
            console.print(f"backend: {report.backend}")
        case _:
            _heavy(console, report, verbose)


def _heavy(console: Console, report: object, verbose: bool) -> None:
    """Reports whose modules import torch or diffusers; by name, so that the other commands need not wait for them."""
    match type(report).__name__:
        case "DemoReport":
            demo.demo(console, cast("DemoReport", report))
        case "LoraDemoReport":
            demo.lora_demo(console, cast("LoraDemoReport", report))
        case "DoctorReport":
            bench.doctor(console, cast("DoctorReport", report), verbose)
        case "BenchReport":
            bench.bench(console, cast("BenchReport", report))
        case "PushReport":
            _push(console, cast("PushReport", report))
        case "InitReport":
            init = cast("InitReport", report)
            console.print(f"{init.path}: a recipe for family {init.family}")
            console.print(f"next: {typed('svdq', 'convert', init.path)}")
        case "RecipesReport":
            inspect.recipes(console, cast("RecipesReport", report), verbose)
        case "ExportReport":
            export = cast("ExportReport", report)
            console.print(
                f"{export.path}: the embedded model as a diffusers pipeline ({bytes_text(export.bytes)})"
            )
            console.print(f"next: {typed('svdq', 'init', export.path, '-o', 'recipe.yaml')}")
        case _:
            console.print(json_text(report))


def _push(console: Console, report: PushReport) -> None:
    for file in report.files:
        console.print(f"{bytes_text(file.bytes):>10}  {file.path}")
    verb = "uploaded to" if report.url else "would be uploaded to"
    console.print(
        f"{len(report.files)} files, {bytes_text(report.bytes)}, {verb} {report.url or report.repository}"
    )


def exit_with(report: object) -> None:
    """End with the exit code of what the report, already on stdout, says: a missed gate, problems, the worst recipe."""
    match report:
        case ConvertReport(gates_missed=missed) | EvalReport(gates_missed=missed) if missed:
            # an evaluation writes no outputs
            converted = isinstance(report, ConvertReport)
            cure = (
                "the outputs are kept and marked" if converted else "use more effort or rank, or other gates"
            )
            _fail(GateMissedError.code, f"gates missed: {'; '.join(missed)}", cure)
        case PlanReport(error=ErrorFacts() as error):
            _fail(error.code, error.message, error.hint or "")
        case CheckReport(problems=(first, *_) as problems):
            message = f"{counted(len(problems), 'problem')}, the first: {first.layer}: {first.what}"
            _fail(CheckFailedError.code, message, _check_cure(report))
        case SeveralReport(code=code) if code:
            failed = [run.source for run in report.runs if run.code != 0]
            said = f"{len(failed)} of {len(report.runs)} recipes failed: {', '.join(failed)}"
            _fail(
                code,
                said,
                "the error of each is shown above; convert one alone for its whole message",
            )
        case _:
            if missed := getattr(report, "gates_missed", ()):  # of a benchmark, whose records need torch
                _fail(GateMissedError.code, f"gates missed: {'; '.join(missed)}", "the figures are above")


@contextmanager
def after_report() -> Iterator[None]:
    """What comes after the report is on stdout: a refusal keeps its exit code, and is said on stderr alone."""
    try:
        yield
    except SvdqError as error:
        _fail(error.code, error.message, error.hint or "")


def _check_cure(report: CheckReport) -> str:
    if report.layer_error and not report.same_source:
        return (
            "the checkpoint is damaged, or it was made from a different model or with a LoRA that it does not record; "
            "compare it with the model that it was made from"
        )
    return "do not use this checkpoint; copy or download it again, or convert again"


def _fail(code: int, message: str, hint: str) -> NoReturn:
    """No failure object follows: the report is the one on stdout."""
    import typer

    print_failure(message, hint)
    raise typer.Exit(code)
