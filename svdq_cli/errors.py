"""Everything svdq refuses to do, as exceptions that speak to the person at the keyboard.

An `SvdqError` carries what the command line needs: an exit code, a stable `kind` for scripts, the message (what and
where), and a hint (what to do). Anything else that escapes is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import errno
from typing import ClassVar


class SvdqError(Exception):
    """Base of all refusals. `kind` is a stable slug for scripts, `where` a file, layer or key."""

    code: ClassVar[int] = 1
    default_kind: ClassVar[str] = "bug"

    def __init__(
        self, message: str, *, hint: str | None = None, where: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        # Python 3.11 and later print these below the message: in a notebook nothing else shows the hint.
        self.__notes__ = [hint] if hint else []
        self.where = where
        self.kind = kind or self.default_kind
        self.resumable = False  # whether the same command with --resume can continue


class UsageError(SvdqError):
    """Bad command line: an option, a path that must not exist, a combination that makes no sense."""

    code = 2
    default_kind = "usage"


class RecipeError(SvdqError):
    """Bad recipe: unknown key, wrong type, a pattern that matches nothing."""

    code = 2
    default_kind = "recipe"


class InputError(SvdqError):
    """The input is missing, damaged, not supported, or already quantized."""

    code = 3
    default_kind = "input"


class EnvironmentLacksError(SvdqError):
    """This machine can't do it: no GPU, a missing library."""

    code = 4
    default_kind = "environment"


class OutOfResourcesError(SvdqError):
    """Memory or disk ran out, after backing off."""

    code = 5
    default_kind = "out-of-resources"


# What torch, and the libraries beneath it, say for want of memory. Their errors are RuntimeErrors of no kind of their
# own, but for the GPU allocator's; and this module does without torch.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def as_out_of_memory(error: BaseException) -> OutOfResourcesError | None:
    """What Python or torch raise for want of memory, as the refusal it is; None for anything else."""
    if not isinstance(error, MemoryError | RuntimeError) or (
        isinstance(error, RuntimeError) and not any(words in str(error) for words in _OUT_OF_MEMORY)
    ):
        return None
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    said = first if "out of memory" in first else f"out of memory: {first}"
    return OutOfResourcesError(
        said,
        hint="close other programs, lower --batch-size, or use --device cpu",
        kind="out-of-memory",
    )


_REFUSED_BY_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)


def as_refused_file(error: OSError) -> InputError | None:
    """An unforeseen system error about a file, as an svdq error; None for anything else."""
    if error.errno not in _REFUSED_BY_THE_SYSTEM or error.filename is None:
        return None
    return InputError(
        f"{error.filename}: {error.strerror}",
        hint="check the path, and that you may read and write there",
        where=str(error.filename),
    )


class GateMissedError(SvdqError):
    """A quality or size gate (`--fail-if`, `gates:`) was missed. The outputs are kept."""

    code = 6
    default_kind = "gate-missed"


class CheckFailedError(SvdqError):
    """The self-check of an output failed. No output has its final name."""

    code = 7
    default_kind = "check-failed"


class InterruptedRunError(SvdqError):
    """The run was told to stop (SIGTERM) and did so cleanly."""

    code = 75
    default_kind = "interrupted"


class CanceledRunError(InterruptedRunError):
    """The user stopped the run (Ctrl-C)."""

    code = 130
    default_kind = "canceled"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the signal met the program. As Ctrl-C's own exception, it is not an `Exception`: no
    library that tries one thing after the other takes it for a failed try."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none: for messages that quote another library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
