"""Whether weight files are still the ones that their conversion wrote: the report next to them has their digest. One
turned bit of a 4-bit code changes no shape and hardly an error, so nothing else would tell. A file that another program
wrote again has other bytes and the same tensors, of which there is a digest too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.checkpoint.writer import report_path
from svdq_cli.errors import InputError
from svdq_cli.reports import CheckProblem
from svdq_cli.source import file_sha256, tensors_sha256
from svdq_cli.source.folders import weight_files
from svdq_cli.storage.json_files import read_json


@dataclass(frozen=True, slots=True)
class Compared:
    """What of the weight files differs from what was written: `problems` where their tensors may, `notes` where their
    bytes alone do."""

    problems: tuple[CheckProblem, ...] = ()
    notes: tuple[str, ...] = ()


def changed_bytes(path: Path, checkpoint: Checkpoint) -> Compared:
    """What of the weight files differs from what was written. Nothing without a report of this output: a copied or
    renamed file has none beside it, and a component's folder alone has none inside. A denoiser that was replaced by
    another output (`svdq lora` of its folder) has that output's report, and is compared with it."""
    if path.is_file():
        return _compared(path, (path,), checkpoint)
    names = checkpoint.source.components
    replaced = [path / name for name in names if report_path(path / name, checkpoint.format).is_file()]
    if replaced:
        found = [_compared(folder, weight_files(folder), checkpoint) for folder in replaced]
        return Compared(
            tuple(problem for each in found for problem in each.problems),
            tuple(note for each in found for note in each.notes),
        )
    files = tuple(file for name in names for file in weight_files(path / name))
    return _compared(path, files, checkpoint)


def _compared(path: Path, files: Sequence[Path], checkpoint: Checkpoint) -> Compared:
    """`files`: of every denoiser, in the order in which they were written."""
    recorded = _recorded(path, checkpoint)
    if recorded is None or not files:
        return Compared()
    size, digest = sum(file.stat().st_size for file in files), file_sha256(*files)
    if digest == recorded.get("sha256"):
        return Compared()
    # earlier reports have none
    if (tensors := recorded.get("tensors_sha256")) is not None and tensors == tensors_sha256(files):
        said = (
            "other bytes than the report beside it says, but the same tensors: another program wrote it again"
        )
        return Compared(notes=(f"{files[0].name}: {said}",))
    said = f"sha256 {digest[:12]} instead of {str(recorded.get('sha256'))[:12]}"
    if size != recorded.get("bytes"):
        said = f"{size} bytes instead of {recorded.get('bytes')}"
    what = (
        f"is not what the report beside it was written for ({said}): damaged, or changed by another program"
    )
    return Compared((CheckProblem(files[0].name, what),))


def _recorded(path: Path, checkpoint: Checkpoint) -> Mapping[str, object] | None:
    """The report's facts of this output: the one of its format."""
    report = report_path(path, checkpoint.format)
    try:
        outputs = read_json(report).get("outputs") if report.is_file() else None
    except InputError:  # what it says of the search is read elsewhere; here the weights are looked at
        return None
    entries = outputs if isinstance(outputs, Sequence) else ()
    own = [
        each for each in entries if isinstance(each, Mapping) and each.get("format") == checkpoint.format.name
    ]
    return own[0] if len(own) == 1 else None
