"""Calibration in parts: what each batch of images adds, one file a batch, merged when all are there.

A run that was stopped generates only what is missing; several processes fill one folder, each with batches of its own.
Sums are taken in the order of the images, so the merged statistics have the same bits however the parts came about.

Per input of a part `<name>/abs_max` (K,) float32, `<name>/squares` (K,) float64, `<name>/rows` (M, K) bfloat16 and
`<name>/tokens`, an int64; in the metadata the peaks of outputs, by input and layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from svdq_cli.calibration.collect import InputPart, Part, merged
from svdq_cli.errors import InputError
from svdq_cli.records import ActivationStats
from svdq_cli.storage.atomic import disk_errors, whole_file
from svdq_cli.storage.tensor_file import save_tensors

_PEAKS = "output_peaks"  # key of a part file's metadata
_SUFFIX = ".safetensors"


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


@dataclass(frozen=True, slots=True)
class _StoredPart(Mapping[str, InputPart]):
    file: Path

    def __getitem__(self, name: str) -> InputPart:
        try:
            with safe_open(self.file, framework="pt") as stored:
                abs_max, squares, rows, tokens = (
                    stored.get_tensor(f"{name}/{key}") for key in ("abs_max", "squares", "rows", "tokens")
                )
                peaks = json.loads((stored.metadata() or {}).get(_PEAKS, "{}")).get(name, {})
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.file}: can't read saved calibration data: {error}",
                hint="remove this file; its images are then generated again",
                where=str(self.file),
                kind="damaged-file",
            ) from error
        return InputPart(abs_max, squares, rows, int(tokens), peaks)

    def __iter__(self) -> Iterator[str]:
        with safe_open(self.file, framework="pt") as stored:
            return iter(dict.fromkeys(key.rpartition("/")[0] for key in stored.keys()))  # noqa: SIM118

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True)
class MergedStats(Mapping[str, ActivationStats]):
    """Statistics by input, each merged from its parts when it is asked for."""

    parts: Mapping[int, Part]
    names: Sequence[str]

    def __getitem__(self, name: str) -> ActivationStats:
        if name not in self.names:
            raise KeyError(name)
        return merged(name, [self.parts[first][name] for first in sorted(self.parts)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _stored(part: InputPart) -> tuple[tuple[str, torch.Tensor], ...]:
    return (
        ("abs_max", part.abs_max),
        ("squares", part.squares),
        ("rows", part.rows.contiguous()),
        ("tokens", torch.tensor(part.tokens)),
    )
