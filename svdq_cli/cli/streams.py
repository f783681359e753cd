"""stdout and stderr as they are in the wild: closed, on a full disk, or read by a `head` that has seen enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

from svdq_cli.errors import OutOfResourcesError


def prepare_streams() -> None:
    """Streams that are closed (`>&-`) lead nowhere, and file names that are no UTF-8 are shown escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        getattr(sys, name).reconfigure(errors="backslashreplace")


@contextmanager
def printing() -> Generator[None, None, None]:
    """Print inside; a reader that has gone away changes no exit code.

    Raises OutOfResourcesError where stdout is a file on a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _lead_nowhere()
    except OSError as error:
        _lead_nowhere()
        raise OutOfResourcesError(
            f"stdout: {error.strerror}",
            hint="the command finished, but its result could not be printed; free some space",
            where="stdout",
            kind="disk-full",
        ) from error


def _lead_nowhere() -> None:
    """Redirect stdout to nowhere; otherwise Python would try to write the rest at exit, and fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
