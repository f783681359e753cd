"""What went wrong: any exception as the refusal it is, and a refusal as the contract's failure object."""

from __future__ import annotations

from dataclasses import dataclass

from svdq_cli.errors import (
    CanceledRunError,
    InterruptedRunError,
    SvdqError,
    Terminated,
    as_out_of_memory,
    as_refused_file,
)


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    code: int
    kind: str
    message: str
    hint: str | None
    where: str | None


@dataclass(frozen=True, slots=True)
class FailureReport:
    """The JSON object of a command that failed."""

    error: ErrorFacts
    command: str | None
    status: str = "error"
    schema: int = 1


def failure_report(error: SvdqError, command: str | None) -> FailureReport:
    facts = ErrorFacts(error.code, error.kind, error.message, error.hint, error.where)
    return FailureReport(facts, command)


def bug_report(error: BaseException, command: str | None) -> FailureReport:
    """The report of an unexpected exception. Its traceback goes to stderr."""
    message = f"{type(error).__name__}: {error}"
    return FailureReport(ErrorFacts(1, "bug", message, "please report it with the traceback", None), command)


def refusal_of(error: BaseException) -> SvdqError | None:
    """The error to report for an exception; None for a bug."""
    match error:
        case SvdqError():
            return error
        case Terminated():
            return InterruptedRunError("stopped by SIGTERM; no output was written under its final name")
        case KeyboardInterrupt():
            return CanceledRunError("interrupted; no output was written under its final name")
        case OSError():
            return as_refused_file(error)
        case _:
            return as_out_of_memory(error)
