"""stdout and stderr as they are in the wild: closed, on a full disk, or read by a `head` that has seen enough."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from svdq_cli.errors import OutOfResourcesError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class ReaderGoneError(BrokenPipeError):
    """Whoever read stdout (`| head`) has seen enough. No other broken connection is this one."""


class _Result(io.FileIO):
    """stdout, whose lost reader is told apart from the lost end of any other pipe or socket."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError as error:
            raise ReaderGoneError(*error.args) from error


class _Progress(io.FileIO):
    """stderr. What can't be shown stops no work: its reader is gone, the terminal has hung up, or the log's disk is
    full."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def prepare_streams() -> None:
    """Streams that are closed (`>&-`) lead nowhere, file names that are no UTF-8 are shown escaped, and a stderr that
    nobody reads any more stops nothing."""
    for name, kind in (("stdout", _Result), ("stderr", _Progress)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
            continue
        stream.reconfigure(errors="backslashreplace")
        if os.name == "posix":  # a console of Windows takes text, not bytes
            setattr(sys, name, _through(kind, stream))


def _through(kind: type[io.FileIO], stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream to where `stream` leads, which writes as `kind` does."""
    raw = kind(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextmanager
def printing() -> Generator[None, None, None]:
    """Print inside; a reader that has gone away changes no exit code.

    Raises OutOfResourcesError where stdout is a file on a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        lead_nowhere()
    except OSError as error:
        lead_nowhere()
        raise OutOfResourcesError(
            f"stdout: {error.strerror}",
            hint="the command finished, but its result could not be printed; free some space",
            where="stdout",
            kind="disk-full",
        ) from error


def lead_nowhere() -> None:
    """Redirect stdout to nowhere; otherwise Python would try to write the rest at exit, and fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
