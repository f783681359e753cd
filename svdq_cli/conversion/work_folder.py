"""The work folder of a conversion: what is finished is kept, so that a run that was killed continues where it stopped.

    WORK/journal.json               whose work this is: model, calibration, recipe, versions
    WORK/pictures/N.safetensors     what each batch of calibration images adds to the statistics, until all are done
    WORK/calibration/               the statistics, if the run collected them itself: an ordinary calibration artefact
    WORK/choices.json               what every rank would cost and bring, where ranks are searched
    WORK/chosen.json                which of them were taken
    WORK/layers/LAYER.safetensors   a layer group, named after its first layer: its solutions and their reports
    WORK/blocks/BLOCK.safetensors   effort best: a block's layers as they were tuned, with their reports
    WORK/outputs/DENOISER.safetensors  step output: its last linear as it was fitted; empty where that stays as it is
    WORK/encoders/NAME.safetensors  a text encoder with 4-bit weights, whole once NAME.json is next to it
    WORK/passages/                  hidden states that host memory had no room for, while blocks are gone through
    WORK/done                       the outputs have their names, and the folder is about to go

A file is there when its part is finished: it is written next to its place, forced to the disk and renamed. Nothing in
the folder is ever changed, so several processes may fill it, each with parts of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, cast
from urllib.parse import quote

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.pack.row_major import pack_rows, unpack_rows
from svdq_cli.pack.tiles import join_nibbles, signed_nibbles, split_nibbles
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerReport,
    LayerSearch,
    LayerSolution,
    NvFp4,
    RotatedPlan,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.source.headers import Header, read_whole_header
from svdq_cli.storage.atomic import is_unfinished, remove_unfinished, whole_file, write_text
from svdq_cli.storage.tensor_file import TensorSpec, write_tensors

JOURNAL = "journal.json"
LAYERS, CALIBRATION, IMAGES = "layers", "calibration", "pictures"
BLOCKS, TUNED, PASSAGES = "blocks", "tuned", "passages"
ENCODERS, OUTPUTS = "encoders", "outputs"
CHOICES, CHOSEN = "choices.json", "chosen.json"
CURVES = "curves.json"  # names of the modulation layers that are stored as curves
_LOCK, _DONE = "lock", "done"
_ABOUT = "svdq"  # key of the safetensors metadata

Identity = Mapping[str, object]  # what the work depends on: JSON values by name


@dataclass(frozen=True, slots=True)
class WorkFolder:
    """An opened work folder. `taken_over`: what an earlier run had finished."""

    path: Path
    taken_over: frozenset[str] = frozenset()  # layer groups
    schema: ClassVar[int] = 1

    @property
    def calibration(self) -> Path:
        """The folder for statistics that the run generates itself."""
        return self.path / CALIBRATION

    @property
    def images(self) -> Path:
        """The folder for the parts of statistics while images are generated."""
        return self.path / IMAGES

    @property
    def passages(self) -> Path:
        """The folder for hidden states that do not fit in host memory; of no use to another run."""
        return self.path / PASSAGES

    @property
    def encoders(self) -> Path:
        """The folder for text encoders with 4-bit weights."""
        return self.path / ENCODERS

    def has(self, folder: str, name: str) -> bool:
        """Whether a part is finished."""
        return self._file(folder, name).is_file()

    def keep(
        self, folder: str, name: str, solutions: Sequence[LayerSolution], about: Mapping[str, object]
    ) -> None:
        """One finished part. `about`: JSON values that belong to it. Codes are packed on the device they are on."""
        stored = {
            f"{solution.plan.name}/{key}": tensor.cpu()
            for solution in solutions
            for key, tensor in _stored(solution).items()
        }
        self.keep_tensors(folder, name, stored, about)

    def keep_tensors(
        self, folder: str, name: str, stored: Mapping[str, Tensor], about: Mapping[str, object]
    ) -> None:
        """One finished part that is no layer."""
        specs = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in stored.items()}
        file = self._file(folder, name)
        file.parent.mkdir(exist_ok=True)
        with (
            whole_file(file) as partial,
            write_tensors(partial, specs, {_ABOUT: json.dumps(about)}) as writer,
        ):
            for key, tensor in stored.items():
                writer.write(key, tensor)

    def discard(self, folder: str, name: str) -> None:
        """A part that turned out to be damaged."""
        self._file(folder, name).unlink()

    def about(self, folder: str, name: str) -> dict[str, object]:
        """What `keep` was told of a part. Raises InputError for a damaged file."""
        header = self._header(folder, name)
        return cast("dict[str, object]", json.loads(header.metadata[_ABOUT]))

    def tensors(self, folder: str, name: str) -> dict[str, Tensor]:
        """What `keep_tensors` was given. Raises InputError for a damaged file."""
        return {key: entry.read() for key, entry in self._header(folder, name).tensors.items()}

    def solution(self, folder: str, name: str, plan: LayerPlan) -> LayerSolution:
        """One layer of a finished part. Raises InputError for a damaged file."""
        entries = self._header(folder, name).tensors
        prefix = f"{plan.name}/"
        found = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
        return _solution(plan, {key: entry.read() for key, entry in found.items()})

    def keep_json(self, name: str, value: object) -> None:
        """A small result under WORK/`name`."""
        write_text(self.path / name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> object | None:
        """The inverse; None where nothing was kept."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finished(self, folder: str) -> frozenset[str]:
        """File names, without their suffix, of the parts that are finished. They are `quoted` names."""
        return frozenset(file.stem for file in (self.path / folder).glob("*.safetensors"))

    @property
    def is_empty(self) -> bool:
        """Whether a run that continues from here would find nothing to take over."""
        own = {JOURNAL, _LOCK}
        return not any(
            file.is_file() and file.name not in own and not is_unfinished(file.name)
            for file in self.path.rglob("*")
        )

    def finish(self) -> None:
        """Remove it, noting first that it is no longer needed: who is killed meanwhile leaves `remove_finished` to
        the next run."""
        (self.path / _DONE).touch()
        self.remove()

    def remove(self) -> None:
        """Everything svdq put there, and the folder if that was all. What tells whose the folder is goes last."""
        remove_unfinished(self.path)
        for name in (LAYERS, BLOCKS, TUNED, OUTPUTS, ENCODERS, PASSAGES, IMAGES, CALIBRATION):
            shutil.rmtree(self.path / name, ignore_errors=True)
        others = {*self.path.glob("*.json")} - {self.path / JOURNAL}
        for file in [*others, *(self.path / name for name in (JOURNAL, _LOCK, _DONE))]:
            file.unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:  # something of the user's is there
            return

    def _file(self, folder: str, name: str) -> Path:
        return self.path / folder / f"{quoted(name)}.safetensors"

    def _header(self, folder: str, name: str) -> Header:
        return read_whole_header(self._file(folder, name))


def quoted(name: str) -> str:
    """A layer's name as a file name."""
    return quote(name, safe="")


# ------------------------------------------------------------------------------------------------- opened and locked


@contextmanager
def open_work(
    path: Path, identity: Identity, *, resume: bool, overwrite: bool
) -> Generator[WorkFolder, None, None]:
    """The folder of this run, locked against other processes. New, or with what an earlier run finished in it.

    `resume` continues with the same run's work, and starts where there is none. `overwrite`, without `resume`, discards
    what is there. Raises UsageError for work that is there already, for work of another run (naming what changed), for
    a folder that is not a work folder, and for one that another process is using.
    """
    _refuse_foreign(path)
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        work = WorkFolder(path)
        remove_unfinished(path)
        known = _identity_of(path)
        if known is not None and not resume and overwrite:
            work.remove()
            path.mkdir(exist_ok=True)
            known = None
        if known is not None:
            _require_same(path, known, identity, resume=resume)
        else:
            work.keep_json(JOURNAL, {"schema": WorkFolder.schema, "kind": "svdq-work", "identity": identity})
        yield WorkFolder(path, work.finished(LAYERS))


def kept_bytes(path: Path) -> int:
    """What the work folder at `path` takes on the disk; 0 where there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_finished(path: Path) -> None:
    """What a run left of its work folder that was killed while it removed it. Raises UsageError where that run is still
    at it."""
    if os.path.isfile(path / _DONE):  # not an error, as Path's own, for a name that no file can have
        with _locked(path):
            WorkFolder(path).remove()
    with suppress(OSError):  # of a folder that is not empty, or none
        path.rmdir()


def changes(before: Identity, after: Identity) -> list[str]:
    """Every value that differs, as "quantization.rank: 32 -> 64"."""
    old, new = dict(_flat(before)), dict(_flat(after))
    return [
        f"{key}: {_said(old.get(key))} -> {_said(new.get(key))}"
        for key in (*old, *(key for key in new if key not in old))
        if old.get(key) != new.get(key)
    ]


def _require_same(path: Path, known: Identity, identity: Identity, *, resume: bool) -> None:
    changed = changes(known, _plain(identity))
    if changed:
        raise UsageError(
            f"{path}: holds unfinished work of a different run: {'; '.join(changed)}",
            hint="resume with the model, recipe and versions that it was started with, or start over with --overwrite"
            + (" instead of --resume" if resume else ""),
            where=str(path),
            kind="work-mismatch",
        )
    if not resume:
        raise UsageError(
            f"{path}: holds an unfinished run of this conversion",
            hint="continue it with --resume, or start over with --overwrite",
            where=str(path),
            kind="work-exists",
        )


def _refuse_foreign(path: Path) -> None:
    """A folder with other things in it is not ours to fill, let alone to remove."""
    own = {JOURNAL, _LOCK, _DONE}
    foreign = path.is_dir() and any(p.name not in own and not is_unfinished(p.name) for p in path.iterdir())
    if foreign and not (path / JOURNAL).is_file():
        raise UsageError(
            f"{path}: not empty, and not a work folder of svdq (it has no {JOURNAL})",
            hint="give an empty or new folder with --work",
            where=str(path),
            kind="work-foreign",
        )
    if path.exists() and not path.is_dir():
        raise UsageError(
            f"{path}: not a folder", hint="give an empty or new folder with --work", where=str(path)
        )


@contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """The lock goes with the process, however it ends."""
    lock = FileLock(path / _LOCK)
    try:
        lock.acquire(timeout=0)  # pyright: ignore[reportUnknownMemberType]
    except Timeout:
        raise UsageError(
            f"{path}: another svdq process is using this folder",
            hint="wait for it, or choose another output with -o",
            where=str(path),
            kind="work-in-use",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _identity_of(path: Path) -> Identity | None:
    """What the journal says; None for a folder without one. UsageError for another schema or a damaged one."""
    try:
        text = (path / JOURNAL).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        said = json.loads(text)
        if said["schema"] == WorkFolder.schema:
            return cast("Identity", said["identity"])
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"{path / JOURNAL}: not a journal that this version of svdq can read",
        hint=f"remove {path}, or give another folder with --work",
        where=str(path / JOURNAL),
        kind="work-mismatch",
    )


def _plain(identity: Identity) -> Identity:
    """The identity as JSON returns it: tuples become lists."""
    return cast("Identity", json.loads(json.dumps(identity)))


def _flat(value: Identity, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(cast("Identity", item), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _said(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------- solutions as tensors


def _stored(solution: LayerSolution) -> dict[str, Tensor]:
    """The tensors of a solution, codes two a byte."""
    tensors = {
        name: value
        for name in solution.__dataclass_fields__
        if isinstance(value := getattr(solution, name), Tensor)
    }
    match solution:
        case W4A4Solution():
            return {**tensors, "codes": pack_rows(solution.codes, solution.plan.precision)}
        case W4A16Solution() | RotatedSolution():
            return {**tensors, "codes": join_nibbles(solution.codes)}


def solved_bytes(plan: LayerPlan, dtype: torch.dtype) -> int:
    """What the tensors of a solved layer take here. `dtype`: of everything that is stored in 16 bits."""
    rows, columns = plan.linear.out_features, plan.linear.in_features
    bias = rows * plan.linear.bias
    match plan:
        case W4A4Plan(precision=precision, rank=rank):
            scale = dtype.itemsize if isinstance(precision, Int4) else 1
            scales = rows * (columns // precision.group) * scale
            sixteen_bit = columns + rank * (rows + columns) + bias + isinstance(precision, NvFp4)
        case W4A16Plan(group=group):
            scales, sixteen_bit = 2 * rows * (columns // group) * dtype.itemsize, bias
        case RotatedPlan(activation_bits=bits, group=group):
            scales, sixteen_bit = 4 * rows + (rows * (columns // group) if bits == 8 else 0), bias
    return rows * columns // 2 + scales + sixteen_bit * dtype.itemsize


def _solution(plan: LayerPlan, stored: Mapping[str, Tensor]) -> LayerSolution:
    """The inverse of `_stored`. InputError for a layer whose tensors are not all there."""
    if "codes" not in stored:
        raise InputError(f"{plan.name}: no solution in the work folder", where=plan.name)
    match plan:
        case W4A4Plan():
            return W4A4Solution(
                plan=plan,
                smooth=stored["smooth"],
                down=stored["down"],
                up=stored["up"],
                codes=unpack_rows(stored["codes"], plan.precision),
                scales=stored["scales"],
                outer=stored.get("outer"),
                bias=stored.get("bias"),
            )
        case W4A16Plan():
            codes = split_nibbles(stored["codes"].view(torch.uint8))
            return W4A16Solution(plan, codes, stored["scales"], stored["zeros"], stored.get("bias"))
        case RotatedPlan():
            nibbles = split_nibbles(stored["codes"].view(torch.uint8))
            codes = signed_nibbles(nibbles) if plan.activation_bits == 4 else nibbles.view(torch.int8)
            return RotatedSolution(
                plan, codes, stored["scales"], stored.get("row_scales"), stored.get("bias")
            )


def report_json(report: LayerReport) -> dict[str, object]:
    """A layer's report as JSON values."""
    return asdict(report)


def report_of_json(said: Mapping[str, object]) -> LayerReport:
    """The inverse of `report_json`."""
    values = dict(said)
    search = cast("Mapping[str, object]", values.pop("search"))
    plain = {
        key: tuple(cast("list[str]", value)) if isinstance(value, list) else value
        for key, value in search.items()
    }
    return LayerReport(**values, search=LayerSearch(**plain))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SolvedLayers(Mapping[str, LayerSolution]):
    """The solutions of a run by layer, each read from the work folder when it is asked for."""

    work: WorkFolder
    places: Mapping[str, tuple[str, str, LayerPlan]]  # layer -> (LAYERS or BLOCKS, part, plan)

    def __getitem__(self, name: str) -> LayerSolution:
        folder, part, plan = self.places[name]
        return self.work.solution(folder, part, plan)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
