"""Everything svdq refuses to do, as exceptions that speak to the person at the keyboard.

An `SvdqError` carries what the command line needs: an exit code, a stable `kind` for scripts, the message (what and
where), and a hint (what to do). Anything else that escapes is a bug and keeps its traceback (exit code 1).

    SvdqError
      UsageError               2    the command line: an option, an output that exists
      RecipeError              2    the recipe: an unknown key, a pattern that matches nothing
      InputError               3    the input: missing, damaged, not supported, already quantized
      EnvironmentLacksError    4    this machine: no GPU, a missing library
      OutOfResourcesError      5    memory or disk ran out
      GateMissedError          6    a quality or size gate was missed; the outputs are kept
      CheckFailedError         7    what was written is not what it should be
      InterruptedRunError     75    SIGTERM, SIGHUP
        CanceledRunError     130    Ctrl-C

`SEVERITY` orders the codes, `Kind` lists the slugs (docs/troubleshooting.md explains each), `stopped` makes a refusal
of what Python, torch and the system raise.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import ClassVar, Literal

# From the best to the worst, for a command that does several things: outputs that missed a gate are there, a bug says
# nothing about the outputs. An interruption ends the command, whatever came before.
SEVERITY = (0, 6, 2, 3, 4, 5, 7, 1)

Kind = Literal[
    # one for each class
    "bug",
    "usage",
    "recipe",
    "input",
    "environment",
    "out-of-resources",
    "gate-missed",
    "check-failed",
    "interrupted",
    "canceled",
    # the command line and its outputs
    "output-exists",
    "other-run",
    "unsupported-format",
    "several-denoisers",
    "not-exact",
    "no-gradients",
    "needless-base",
    "needs-base",
    "wrong-base",
    "wrong-source",
    "work-exists",
    "work-foreign",
    "work-in-use",
    "work-mismatch",
    # inputs
    "not-found",
    "not-a-file",
    "unsafe-path",
    "damaged-file",
    "pickle",
    "one-shard",
    "claimed-twice",
    "unread-names",
    "variant-only",
    "already-quantized",
    "not-finite",
    "out-of-range",
    "unknown-family",
    "unknown-layer",
    "not-a-linear",
    "shape-mismatch",
    "lora",
    "lora-mismatch",
    # the machine
    "no-gpu",
    "no-bfloat16",
    "no-kernel-for-gpu",
    "no-cupy",
    "no-nvrtc",
    "no-compiler",
    "compiler-failed",
    "no-cache",
    "engine-not-loaded",
    "not-a-cpu",
    "hub",
    "process-lost",
    "out-of-memory",
    "disk-full",
]


class SvdqError(Exception):
    """Base of all refusals. `kind` is a stable slug for scripts, `where` a file, layer or key."""

    code: ClassVar[int] = 1
    default_kind: ClassVar[Kind] = "bug"

    def __init__(
        self, message: str, *, hint: str | None = None, where: str | None = None, kind: Kind | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        # Python 3.11 and later print these below the message: in a notebook nothing else shows the hint.
        self.__notes__ = [hint] if hint else []
        self.where = where
        self.kind: Kind = kind or self.default_kind
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


class GateMissedError(SvdqError):
    """A quality or size gate (`--fail-if`, `gates:`) was missed. The outputs are kept."""

    code = 6
    default_kind = "gate-missed"


class CheckFailedError(SvdqError):
    """The self-check of an output failed. No output has its final name."""

    code = 7
    default_kind = "check-failed"


class InterruptedRunError(SvdqError):
    """The run was told to stop (SIGTERM, or SIGHUP: its terminal is gone) and did so cleanly."""

    code = 75
    default_kind = "interrupted"


class CanceledRunError(InterruptedRunError):
    """The user stopped the run (Ctrl-C)."""

    code = 130
    default_kind = "canceled"


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where the signal met the program. As Ctrl-C's own exception, it is not an `Exception`:
    no library that tries one thing after the other takes it for a failed try."""

    def __init__(self, signal: str = "SIGTERM") -> None:
        super().__init__(signal)
        self.signal = signal


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


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error, None where there is none. safetensors has it in its text alone, and so has
    `shutil.copytree`, whose error quotes those of several files: the first counts."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"(?:\[Errno |os error )(\d+)", str(error))
    return int(found[1]) if found else None


_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def as_full_disk(
    error: BaseException,
    path: Path | None = None,
    *,
    hint: str = "free some space, or write to another disk",
) -> OutOfResourcesError | None:
    """A write that found no room, as the refusal it is; None for anything else. `path`: the output, where one is known;
    else the file that the system names."""
    number = errno_of(error)
    if number not in _FULL_DISK:
        return None
    named = path or getattr(error, "filename", None)
    # FAT takes 4 GB
    said = (
        "the file exceeds the size limit of the file system" if number == errno.EFBIG else "the disk is full"
    )
    return OutOfResourcesError(
        f"{named}: {said}" if named else said,
        hint=f"{hint}; no output was written under the final name",
        where=str(named) if named else None,
        kind="disk-full",
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


def stopped(error: BaseException) -> SvdqError | None:
    """The error to report for an exception, whoever raised it; None for a bug."""
    match error:
        case SvdqError():
            return error
        case Terminated():
            return InterruptedRunError(
                f"stopped by {error.signal}; no output was written under its final name"
            )
        case KeyboardInterrupt():
            return CanceledRunError("interrupted; no output was written under its final name")
        case OSError():
            return as_full_disk(error) or as_refused_file(error)
        case _:
            return as_out_of_memory(error) or as_full_disk(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none: for messages that quote another library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
