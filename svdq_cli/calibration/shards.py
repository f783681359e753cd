"""Webdataset shards: tar files in which the members of one name up to its first dot are one sample.

`datasets` reads them too, but refuses a shard in which one sample lacks its caption or has another kind of file, which
people's shards have.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svdq_cli.calibration.columns import USUAL_COLUMNS
from svdq_cli.errors import InputError, first_line

# What the names of captions end in, the likeliest first; kohya's trainers write the first two
CAPTION_KINDS = ("txt", "caption", "cap", "prompt", "text")
_LARGEST = 1 << 20  # bytes of a caption or of a sample's facts; what is larger is no such thing


@dataclass(slots=True)
class Sample:
    """What a shard says of one image in words. `texts`: by what follows the sample's name, `txt` or
    `instruction.txt`."""

    texts: dict[str, str] = field(default_factory=dict[str, str])
    facts: Mapping[str, object] | None = None  # its .json

    def caption(self, column: str | None) -> str | None:
        """The text that `column` names; without one the likeliest, or the only one there is."""
        if column is not None:
            return self.texts.get(column)
        usual = (*CAPTION_KINDS, *(f"{name}.{kind}" for name in USUAL_COLUMNS for kind in CAPTION_KINDS))
        found = next((self.texts[kind] for kind in usual if kind in self.texts), None)
        return next(iter(self.texts.values())) if found is None and len(self.texts) == 1 else found


def samples_of(path: Path) -> Iterator[Sample]:
    """The samples of a shard in their order, images left out. Nothing is unpacked to disk.

    Raises InputError for a file that is not a plain tar archive, and for a member that can't be read as text or JSON.
    """
    try:
        with tarfile.open(path, "r:") as shard:
            yield from _samples(path, shard)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{path}: can't be read as a tar archive: {first_line(error)}",
            hint="webdataset shards are plain .tar files; unpack an archive of another kind",
            where=str(path),
        ) from error


def _samples(path: Path, shard: tarfile.TarFile) -> Iterator[Sample]:
    key, sample = None, Sample()
    for member in shard:
        folder, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        if not member.isfile() or not stem:
            continue
        if key is not None and key != (folder, stem):
            yield sample
            sample = Sample()
        key = (folder, stem)
        if kind.rpartition(".")[2] in CAPTION_KINDS:
            sample.texts[kind] = _text(path, shard, member)
        elif kind == "json":
            sample.facts = _facts(path, shard, member)
    if key is not None:
        yield sample


def _text(path: Path, shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member) if member.size <= _LARGEST else None
    try:
        if file is None:
            raise ValueError(f"{member.size} bytes")
        return file.read().decode("utf-8-sig")
    except ValueError as error:
        raise InputError(
            f"{path}: {member.name}: not a caption: {first_line(error)}",
            hint="captions and facts of a shard are text in UTF-8, at most 1 MiB each",
            where=f"{path}:{member.name}",
        ) from error


def _facts(path: Path, shard: tarfile.TarFile, member: tarfile.TarInfo) -> Mapping[str, object] | None:
    try:
        facts = json.loads(_text(path, shard, member))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: {member.name}: not readable JSON: {first_line(error)}",
            hint="mend the shard, or give the captions in a text file",
            where=f"{path}:{member.name}",
        ) from error
    return facts if isinstance(facts, dict) else None
