"""What went wrong: any exception as the refusal it is, and a refusal as the contract's failure object."""

from __future__ import annotations

from dataclasses import dataclass

from svdq_cli.errors import OutOfResourcesError, SvdqError


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


def bug_report(error: Exception, command: str | None) -> FailureReport:
    """For an exception that nobody foresaw. Its traceback goes to stderr."""
    message = f"{type(error).__name__}: {error}"
    return FailureReport(ErrorFacts(1, "bug", message, "please report it with the traceback", None), command)


def refusal_of(error: BaseException) -> SvdqError | None:
    """The refusal that an exception stands for; None for a bug."""
    match error:
        case SvdqError():
            return error
        case MemoryError():
            return _out_of_memory(error)
        case RuntimeError() if "out of memory" in str(error):  # torch's own kind, without importing torch
            return _out_of_memory(error)
        case _:
            return None


def _out_of_memory(error: BaseException) -> OutOfResourcesError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OutOfResourcesError(
        f"out of memory: {first}",
        hint="close other programs, lower --batch-size, or use --device cpu",
        kind="out-of-memory",
    )
