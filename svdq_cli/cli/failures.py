"""What went wrong: any exception as the refusal it is, and a refusal as the contract's failure object."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from svdq_cli.errors import SvdqError
from svdq_cli.reports import ErrorFacts, error_facts
from svdq_cli.text import printable


@dataclass(frozen=True, slots=True)
class FailureReport:
    """The JSON object of a command that failed."""

    error: ErrorFacts
    command: str | None
    status: str = "error"
    schema: int = 1


def failure_report(error: SvdqError, command: str | None) -> FailureReport:
    return FailureReport(error_facts(error, error.code), command)


def bug_report(error: BaseException, command: str | None) -> FailureReport:
    """The report of an unexpected exception. Its traceback goes to stderr."""
    message = f"{type(error).__name__}: {error}"
    return FailureReport(ErrorFacts(1, "bug", message, "please report it with the traceback", None), command)


def print_failure(message: str, *lines: str | None) -> None:
    """What went wrong, on stderr, and below it the lines that say what to do."""
    print(f"svdq: {printable(message)}", file=sys.stderr)
    for line in filter(None, lines):
        print(f"      {printable(line)}", file=sys.stderr)
