"""`svdq push`: a checked checkpoint to a repository of the Hugging Face hub, in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import NEEDS_METADATA, open_checkpoint
from svdq_cli.checkpoint.writer import report_path
from svdq_cli.conversion.card import CARD_FILE, card_path, with_repository
from svdq_cli.errors import CheckFailedError, EnvironmentLacksError, GateMissedError, UsageError
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.source.modular_index import index_of_copy
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import MODULAR_INDEX

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class PushedFile:
    path: str  # in the repository
    bytes: int


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was, or would be, uploaded."""

    repository: str
    private: bool
    files: tuple[PushedFile, ...]
    bytes: int
    url: str | None  # of the commit; None for a dry run
    command: str = "push"
    status: str = "ok"
    schema: int = 1


def push(
    path: Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    observe: Observer = ignore_events,
) -> PushReport:
    """Upload a checkpoint. A folder goes as it is, but for the report, which names folders of this machine; a file goes
    under its name, with the card next to it. The index of a modular pipeline is made to name the repository.

    Raises CheckFailedError for a checkpoint that fails its check, GateMissedError for one that missed its gates,
    EnvironmentLacksError where the Hub can't be reached or does not let one in.
    """
    if _REPOSITORY.fullmatch(repository) is None:
        raise UsageError(
            f"{repository!r} is not a valid repository name (owner/name)",
            hint="write it as owner/name",
            where=repository,
        )
    _require_publishable(path)
    files = _files(path)
    listed = tuple(PushedFile(name, file.stat().st_size) for name, file in files.items())
    total = sum(file.bytes for file in listed)
    url = None
    if not dry_run:
        observe(Event("start", "push", 0, len(files)))
        url = _commit(repository, files, private=private)
        observe(Event("end", "push", len(files), len(files)))
    return PushReport(repository, private, listed, total, url, status="planned" if dry_run else "ok")


def _require_publishable(path: Path) -> None:
    problems = check(path).problems
    if problems:
        raise CheckFailedError(
            f"{path}: not uploaded, because it fails its check: {problems[0].layer}: {problems[0].what}",
            hint="convert again; svdq check lists all problems",
            where=str(path),
        )
    report = report_path(path, open_checkpoint(path, hint=NEEDS_METADATA).format)
    missed = read_json(report).get("gates_missed") if report.is_file() else None
    if isinstance(missed, list) and missed:
        raise GateMissedError(
            f"{path}: not uploaded, because it missed its gates: {'; '.join(map(str, missed))}",
            hint="convert again, with a higher --effort or other gates",
            where=str(path),
        )


def _files(path: Path) -> Mapping[str, Path]:
    """What is uploaded, by its name in the repository."""
    if path.is_file():
        card = card_path(path)
        return {path.name: path, **({CARD_FILE: card} if card.is_file() else {})}
    report = report_path(path, open_checkpoint(path, hint=NEEDS_METADATA).format)
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and file != report
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    }


def _content(file: Path, repository: str) -> str | bytes:
    """A file's path; the text of a model card, whose code loads the repository, and of a modular index, whose
    components are those of the repository."""
    if file.name.endswith(CARD_FILE):
        return with_repository(file.read_text(encoding="utf-8"), repository).encode()
    if file.name != MODULAR_INDEX:
        return str(file)
    here = {folder.name for folder in file.parent.iterdir() if folder.is_dir()}
    return json.dumps(index_of_copy(read_json(file), here, repository), indent=2).encode()


def _commit(repository: str, files: Mapping[str, Path], *, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="svdq")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(
            repository,
            [CommitOperationAdd(name, _content(file, repository)) for name, file in files.items()],
            commit_message="Upload a checkpoint made with svdq",
        )
    except Exception as error:  # the client raises its own kinds and those of its HTTP library
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise EnvironmentLacksError(
            f"{repository}: the Hub rejected the upload ({type(error).__name__}: {first})",
            hint="log in with `hf auth login` or set HF_TOKEN (a token with write access); check the connection",
            where=repository,
            kind="hub",
        ) from error
    return done.commit_url
