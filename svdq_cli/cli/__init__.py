"""The command line: parse, call one library function, render. The only room that prints."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import signal
import sys
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from svdq_cli.cli.failures import FailureReport
    from svdq_cli.errors import SvdqError


def main() -> NoReturn:
    """Entry point of `svdq`. Exit codes are those of the command-line contract."""
    from svdq_cli.cli.streams import prepare_streams
    from svdq_cli.system.allocator import keep_freed_memory

    keep_freed_memory()
    stop_cleanly()
    prepare_streams()
    code = run(sys.argv[1:])
    gc.freeze()  # or Python searches torch and diffusers for garbage as it ends, which takes it a second
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; nothing escapes but bugs."""
    try:
        return _run(arguments)
    except KeyboardInterrupt as error:
        # Ctrl-C or SIGTERM that came while the command line itself was being imported.
        from svdq_cli.errors import stopped

        if (refusal := stopped(error)) is None:
            raise
        return _refuse(refusal, arguments)


def _run(arguments: list[str]) -> int:
    # Advice that these libraries print at import (missing torchvision, tensor cores, kernels) is not about the model.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import typer

    from svdq_cli.cli.app import app
    from svdq_cli.cli.completion import VARIABLE, answer
    from svdq_cli.cli.streams import ReaderGoneError, lead_nowhere
    from svdq_cli.errors import UsageError, stopped

    try:
        command = typer.main.get_command(app)
        if instruction := os.environ.get(VARIABLE):
            return answer(command, instruction)
        # Not called as a whole: Typer would make exit code 130 of Ctrl-C and of SIGTERM, and say nothing.
        with command.make_context("svdq", list(arguments)) as context:
            result = command.invoke(context)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except _usage_errors() as error:
        if not arguments:  # the help, which is the whole of this error's message
            print(error.format_message(), file=sys.stderr)
            return UsageError.code
        return _refuse(UsageError(error.format_message(), hint=_usage_hint(error)), arguments)
    except ReaderGoneError:  # of the help, say
        lead_nowhere()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if (refusal := stopped(error)) is not None:
            return _refuse(refusal, arguments)
        _report_bug(error, arguments)
        raise


def _refuse(error: SvdqError, arguments: list[str]) -> int:
    """Say what, where and what to do: for people on stderr, for scripts as one JSON object on stdout."""
    from svdq_cli.cli.failures import failure_report, print_failure
    from svdq_cli.errors import InterruptedRunError

    if isinstance(error, InterruptedRunError):
        _ignore_signals()  # who is impatient, or a shell that hangs up after Ctrl-C, changes no exit code
    _show_failure(failure_report(error, _command(arguments)), arguments)
    resume = f"to resume: {_resuming(arguments)}" if error.resumable else None
    print_failure(error.message, error.hint, resume)
    return error.code


def _resuming(arguments: list[str]) -> str:
    """The command that resumes what this one left unfinished."""
    return shlex.join(["svdq", *arguments, *(["--resume"] if "--resume" not in arguments else [])])


def _report_bug(error: BaseException, arguments: list[str]) -> None:
    """A bug keeps its traceback, and scripts still get their one object."""
    from svdq_cli.cli.failures import bug_report

    _show_failure(bug_report(error, _command(arguments)), arguments)


def _show_failure(report: FailureReport, arguments: list[str]) -> None:
    """Where the arguments, which may be what is wrong, ask for it: JSON on stdout, and the summary."""
    from svdq_cli.cli.streams import printing
    from svdq_cli.cli.summary import append_summary
    from svdq_cli.errors import OutOfResourcesError
    from svdq_cli.reports import json_text

    if "--json" in arguments:
        # What failed counts more than that stdout can't take it
        with suppress(OutOfResourcesError), printing():
            print(json_text(report))
    append_summary(report, _value_of("--summary", arguments))


def _command(arguments: list[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _value_of(option: str, arguments: list[str]) -> Path | None:
    """What follows an option, as `--option VALUE` or `--option=VALUE`."""
    for word, after in zip_longest(arguments, arguments[1:]):
        if word == option:
            return Path(os.path.expanduser(after)) if after is not None else None
        if word.startswith(f"{option}="):
            return Path(os.path.expanduser(word.removeprefix(f"{option}=")))
    return None


def _usage_errors() -> Any:
    """Click's base error. Newer versions of Typer ship a copy of Click, so it is found through a name of Typer's."""
    import typer

    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _usage_hint(error: object) -> str:
    context = getattr(error, "ctx", None)
    if context is None or context.parent is None:
        return "svdq --help shows the commands"
    return f"{context.command_path} --help shows the options"


def _stops() -> list[signal.Signals]:
    """Signals that end a command cleanly: of a batch system, and of a terminal or connection that is closed."""
    return [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


def stop_cleanly() -> None:
    """Make these signals exceptions, which end a command with what is finished kept."""
    for number in _stops():
        # nohup has SIGHUP ignored, which children inherit
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, *_stops()):
        signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    from svdq_cli.errors import Terminated

    raise Terminated(signal.Signals(number).name)
