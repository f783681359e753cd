"""The command line: parse, call one library function, render. The only room that prints."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


def main() -> NoReturn:
    """Entry point of `svdq`. Exit codes are those of the command-line contract."""
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; nothing escapes but bugs."""
    # Advice that these libraries print at import (missing torchvision, tensor cores) is not about the user's model.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import typer

    from svdq_cli.cli.app import app
    from svdq_cli.errors import SvdqError, UsageError

    try:
        result = app(args=arguments, prog_name="svdq", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except SvdqError as error:
        return _refuse(error, arguments)
    except typer.Exit as stop:
        return stop.exit_code
    except _usage_errors() as error:
        return _refuse(UsageError(error.format_message(), hint=_usage_hint(error)), arguments)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; nothing was left under a final name", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except MemoryError as error:
        return _refuse(_out_of_memory(error), arguments)
    except RuntimeError as error:
        if "out of memory" in str(error):
            return _refuse(_out_of_memory(error), arguments)
        raise


def _refuse(error: object, arguments: list[str]) -> int:
    """Say what, where and what to do: for people on stderr, for scripts as one JSON object on stdout."""
    from svdq_cli.errors import SvdqError

    assert isinstance(error, SvdqError)
    if "--json" in arguments:
        facts = {
            "code": error.code,
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "where": error.where,
        }
        command = next((word for word in arguments if not word.startswith("-")), None)
        print(json.dumps({"schema": 1, "command": command, "status": "error", "error": facts}, indent=1))
    print(f"svdq: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"      {error.hint}", file=sys.stderr)
    return error.code


def _usage_errors() -> Any:
    """Click's base error. Newer versions of Typer ship a copy of Click, so it is found through a name of Typer's."""
    import typer

    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _usage_hint(error: object) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'svdq'} --help shows the options"


def _out_of_memory(error: BaseException) -> Exception:
    from svdq_cli.errors import OutOfResourcesError

    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OutOfResourcesError(
        f"out of memory: {first}", hint="close other programs, lower --batch-size, or use --device cpu"
    )


def _stop(number: int, frame: FrameType | None) -> None:
    from svdq_cli.errors import InterruptedRunError

    raise InterruptedRunError(
        "told to stop (SIGTERM); nothing was left under a final name", hint="run the same command again"
    )
