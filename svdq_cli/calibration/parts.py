"""Calibration in parts: what each batch of images adds, one file a batch, merged when all are there.

A run that was stopped generates only what is missing; several processes fill one folder, each with batches of its own.
Sums are taken in the order of the images, so the merged statistics have the same bits however the parts came about.

Per input of a part `<name>/abs_max` (K,) float32, `<name>/squares` (K,) float64, `<name>/rows` (M, K) bfloat16 and
`<name>/tokens`, an int64; where the covariance of more tokens is taken, these as `<name>/covariance_rows` (M, K)
bfloat16. In the metadata the peaks of outputs, by input and layer. Next to the parts lies a file of the inputs that
depend on time alone, (T, K) bfloat16 by name (`over_time`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from svdq_cli.calibration.collect import InputPart, Part, merged
from svdq_cli.errors import InputError
from svdq_cli.records import ActivationStats
from svdq_cli.storage.atomic import disk_errors, whole_file
from svdq_cli.storage.tensor_file import save_tensors

_PEAKS = "output_peaks"  # key of a part file's metadata
_MORE = "covariance_rows"
_SUFFIX = ".safetensors"
_OVER_TIME = f"over-time{_SUFFIX}"


@dataclass(frozen=True, slots=True)
class PartFolder(MutableMapping[int, Part]):
    """Parts by the index of their first image. A file is there when its part is finished."""

    path: Path

    def __contains__(self, first: object) -> bool:
        return isinstance(first, int) and self._file(first).is_file()

    def __getitem__(self, first: int) -> Part:
        if first not in self:
            raise KeyError(first)
        return _StoredPart(self._file(first))

    def __setitem__(self, first: int, part: Part) -> None:
        tensors = {f"{name}/{key}": value for name, each in part.items() for key, value in _stored(each)}
        file = self._file(first)
        peaks = {name: dict(each.output_peaks) for name, each in part.items()}
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as partial:
                save_tensors(partial, tensors, {_PEAKS: json.dumps(peaks)})

    def __delitem__(self, first: int) -> None:
        self._file(first).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(file.stem) for file in self.path.glob(f"*{_SUFFIX}") if file.stem.isdecimal()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, first: int) -> Path:
        return self.path / f"{first:06d}{_SUFFIX}"

    @property
    def has_over_time(self) -> bool:
        """Whether it was looked for inputs that depend on time alone, whatever was found."""
        return (self.path / _OVER_TIME).is_file()

    def keep_over_time(self, found: Mapping[str, torch.Tensor]) -> None:
        """What `inputs_over_time` returned."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path / _OVER_TIME) as partial:
                save_tensors(partial, found, {})

    def over_time(self, name: str) -> torch.Tensor | None:
        """(T, K) of an input that depends on time alone; None for any other."""
        if not self.has_over_time:
            return None
        file = self.path / _OVER_TIME
        with _readable(file), safe_open(file, framework="pt") as stored:
            return stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118

    def clear(self) -> None:
        """Remove everything, once it is merged."""
        for first in list(self):
            del self[first]
        (self.path / _OVER_TIME).unlink(missing_ok=True)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: can't read saved calibration data: {error}",
            hint="remove this file; its images are then generated again",
            where=str(file),
            kind="damaged-file",
        ) from error


@dataclass(frozen=True, slots=True)
class _StoredPart(Mapping[str, InputPart]):
    file: Path

    def __getitem__(self, name: str) -> InputPart:
        with _readable(self.file), safe_open(self.file, framework="pt") as stored:
            abs_max, squares, rows, tokens = (
                stored.get_tensor(f"{name}/{key}") for key in ("abs_max", "squares", "rows", "tokens")
            )
            more = f"{name}/{_MORE}"
            found = stored.get_tensor(more) if more in stored.keys() else None  # noqa: SIM118
            peaks = json.loads((stored.metadata() or {}).get(_PEAKS, "{}")).get(name, {})
        return InputPart(abs_max, squares, rows, int(tokens), peaks, found)

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.file, framework="pt") as stored:
            return iter(dict.fromkeys(key.rpartition("/")[0] for key in stored.keys()))  # noqa: SIM118

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True)
class MergedStats(Mapping[str, ActivationStats]):
    """Statistics by input, each merged from its parts when it is asked for."""

    parts: PartFolder
    names: Sequence[str]

    def __getitem__(self, name: str) -> ActivationStats:
        if name not in self.names:
            raise KeyError(name)
        found = merged(name, (self.parts[first][name] for first in sorted(self.parts)))
        return replace(found, over_time=self.parts.over_time(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _stored(part: InputPart) -> tuple[tuple[str, torch.Tensor], ...]:
    more = () if part.covariance_rows is None else ((_MORE, part.covariance_rows.contiguous()),)
    return (
        *more,
        ("abs_max", part.abs_max),
        ("squares", part.squares),
        ("rows", part.rows.contiguous()),
        ("tokens", torch.tensor(part.tokens, dtype=torch.int64)),
    )
