"""A long job and its work folder: what is kept when the job is stopped, and what is said of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from svdq_cli.conversion.work_folder import Identity, WorkFolder, open_work
from svdq_cli.errors import (
    CheckFailedError,
    InputError,
    RecipeError,
    SvdqError,
    UsageError,
    stopped,
)
from svdq_cli.prepare.options import RunOptions
from svdq_cli.records import Event, Observer
from svdq_cli.storage.atomic import disk_errors, refuse_existing

NAMING = "naming.json"  # in the work folder: the outputs of a run that has started to give them their names
VISIBLE_WITHIN = 90.0  # seconds; NFS looks again after 60 at the latest


@contextmanager
def kept_work(
    path: Path,
    identity: Identity,
    *,
    options: RunOptions,
    stage: str,
    kept: Callable[[WorkFolder], str],
    observe: Observer,
) -> Iterator[WorkFolder]:
    """The job's work folder. It goes when the work is done, and when the same command could only fail again; it stays,
    with a word on how to continue, whatever else ends the run.

    `kept`: what the folder holds, in words ("3 of 7 layer groups solved"). `stage` names the job in events.
    """
    with (
        disk_errors(path),
        open_work(path, identity, resume=options.resume, overwrite=options.overwrite) as work,
    ):
        try:
            with disk_errors(path):  # here too, so that the error says what is kept
                yield work
        except BaseException as error:
            refusal = stopped(error) or error
            if work.is_empty or (_is_refused(error, work) and not work.calibration.exists()):
                work.remove()
            elif _is_refused(error, work):
                said = f"move {work.calibration}, the calibration statistics, elsewhere and give them with --calib"
                add_to_hint(error, said, stage, observe)
            else:
                said = f"{work.path} keeps {kept(work)}; continue with --resume"
                say_what_is_kept(refusal, said, stage, observe)
            if refusal is error:
                raise
            raise refusal from error
        work.finish()


def work_beside(output: Path, options: RunOptions) -> Path:
    """Where a job's work is stored: hidden next to its (first) output, unless the user chooses a path."""
    return options.work or output.with_name(f".{output.name}.work")


def require_new(paths: Sequence[Path], options: RunOptions) -> bool:
    """UsageError for an output that exists and may not be replaced. Returns whether outputs that exist may be: as the
    user says, or where this very run was killed while its outputs got their names, one after another."""
    naming = work_beside(paths[0], options) / NAMING
    begun = options.resume and naming.is_file()
    replaces = options.overwrite or (
        begun and json.loads(naming.read_text(encoding="utf-8")) == names_of(paths)
    )
    for path in paths:
        refuse_existing(path, overwrite=replaces)
    return replaces


def names_of(paths: Sequence[Path]) -> list[str]:
    """Outputs as `NAMING` has them."""
    return [str(path.absolute()) for path in paths]


def wait_for_files(folder: Path, missing: Callable[[], Sequence[object]]) -> None:
    """Wait for other processes' files: a shared file system may show them late. InputError if they do not appear."""
    until = time.monotonic() + VISIBLE_WITHIN
    while names := missing():
        if time.monotonic() > until:
            raise InputError(
                f"{folder}: {names[0]}, written by another process, is not visible here",
                hint="all processes need one work folder: put the output, or --work, on a shared file system",
                where=str(folder),
            )
        time.sleep(1)


def _is_refused(error: BaseException, work: WorkFolder) -> bool:
    """Whether the same command would end the same way, so that there is nothing to continue with. Statistics that were
    generated serve other runs too; they are never thrown away."""
    about_the_work = isinstance(error, SvdqError) and str(error.where).startswith(str(work.path))
    return isinstance(error, (UsageError, RecipeError, InputError, CheckFailedError)) and not about_the_work


def say_what_is_kept(error: BaseException, said: str, stage: str, observe: Observer) -> None:
    """Add what is kept to the error's hint; for a bug, which has no hint, send it as a warning."""
    if isinstance(error, SvdqError):
        error.resumable = True
    add_to_hint(error, said, stage, observe)


def add_to_hint(error: BaseException, said: str, stage: str, observe: Observer) -> None:
    """`said` behind the error's hint; for a bug, which has no hint, as a warning."""
    if not isinstance(error, SvdqError):
        observe(Event("warning", stage, detail=said))
        return
    error.hint = f"{error.hint}; {said}" if error.hint else said
