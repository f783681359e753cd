"""The calibration artefact: a folder of safetensors and `manifest.json`, made once and used by many conversions.

Per input `<name>/abs_max` (K,) float32, `<name>/second_moment` (K,) float32 and `<name>/rows` (M, K) bfloat16, of one
that depends on time alone also `<name>/over_time` (T, K) bfloat16; of one with few rows for its channels also the
covariance of more tokens, `<name>/covariance.mean` and `.deviation` (K,) float32 and `.correlations` (K (K - 1) / 2,)
float16 (`calibration.covariance`); several inputs a file. The manifest's digest covers
everything that a conversion reads; neither the time of day, the svdq version nor the split into files enters it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.pipelines.settings import SamplingSettings, settings_json, settings_of_json
from svdq_cli.records import ActivationStats, InputCovariance
from svdq_cli.storage.atomic import refuse_existing, whole_folder
from svdq_cli.storage.tensor_file import save_tensors

MANIFEST = "manifest.json"
KIND = "svdq-calibration"
MAX_FILE_BYTES = 512 * 2**20
_TENSORS = {"abs_max": torch.float32, "second_moment": torch.float32, "rows": torch.bfloat16}
_COVARIANCE = {"mean": torch.float32, "deviation": torch.float32, "correlations": torch.float16}
_PARTS = {
    **_TENSORS,
    "over_time": torch.bfloat16,  # of inputs that depend on time alone
    **{f"covariance.{name}": dtype for name, dtype in _COVARIANCE.items()},
}


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """Where statistics come from: the model, the prompts and how the images were generated."""

    svdq_version: str
    model_class: str
    family: str
    source_sha256: str | None
    settings: SamplingSettings
    prompts_sha256: str
    prompts_count: int


@dataclass(frozen=True, slots=True)
class InputEntry:
    """One input in the manifest. `sha256` is over the shapes and values of its tensors."""

    name: str
    k: int
    rows: int
    tokens_seen: int
    file: str
    sha256: str
    peak: float | None = None  # the input's largest number
    # the same of each layer's output; older artefacts have neither
    output_peaks: Mapping[str, float] = field(default_factory=dict[str, float])
    covariance_tokens: int = 0  # of which there is the covariance; 0 where there is none


@dataclass(frozen=True, slots=True)
class CalibrationManifest:
    facts: CalibrationFacts
    inputs: tuple[InputEntry, ...]
    file_bytes: Mapping[str, int]  # file name -> size
    digest: str
    schema: ClassVar[int] = 1

    @property
    def bytes(self) -> int:
        return sum(self.file_bytes.values())


@dataclass(frozen=True, slots=True)
class Calibration:
    """An opened artefact. Tensors are read when `stats` asks for them."""

    path: Path
    manifest: CalibrationManifest

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.manifest.inputs)

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def stats(self, name: str) -> ActivationStats:
        """Reads one input. Raises InputError if the artefact lacks it or its data are damaged."""
        entry = next((entry for entry in self.manifest.inputs if entry.name == name), None)
        if entry is None:
            raise InputError(
                f"{self.path}: no statistics for {name!r}",
                hint="this calibration was made for a different model or family; run svdq calibrate on this one",
                where=name,
            )
        file = self.path / entry.file
        try:
            with safe_open(file, framework="pt") as tensors:
                parts = [part for part in _PARTS if part in _TENSORS or f"{name}/{part}" in tensors.keys()]  # noqa: SIM118
                found = {part: tensors.get_tensor(f"{name}/{part}") for part in parts}
        except (SafetensorError, OSError) as error:
            raise _damaged(file, f"can't be read ({error})") from error
        stats = ActivationStats(
            name=name,
            tokens_seen=entry.tokens_seen,
            covariance=_covariance(found, entry.covariance_tokens),
            **{part: tensor for part, tensor in found.items() if "." not in part},
        )
        if _stats_sha256(stats) != entry.sha256:
            raise _damaged(file, f"the statistics of {name} do not match their digest in {MANIFEST}")
        return stats


# ---------------------------------------------------------------------------------------------------- write


def save_calibration(
    path: Path, stats: Mapping[str, ActivationStats], facts: CalibrationFacts, *, overwrite: bool = False
) -> CalibrationManifest:
    """Writes the folder whole, or leaves nothing under `path`.

    Raises UsageError if `path` exists (unless `overwrite` and it is a calibration), OutOfResourcesError on a full disk.
    """
    _check_target(path, overwrite=overwrite)
    with whole_folder(path, overwrite=overwrite) as folder:
        entries: list[InputEntry] = []
        file_bytes: dict[str, int] = {}
        for index, group in enumerate(_groups(stats)):
            file = f"stats-{index + 1:05d}.safetensors"
            tensors = {f"{s.name}/{part}": each for s in group for part, each in _tensors(s).items()}
            save_tensors(folder / file, tensors, {})
            file_bytes[file] = (folder / file).stat().st_size
            entries += [_entry(s, file) for s in group]
        manifest = CalibrationManifest(
            facts=facts, inputs=tuple(entries), file_bytes=file_bytes, digest=_digest(facts, entries)
        )
        text = json.dumps(_manifest_json(manifest), indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _check_target(path: Path, *, overwrite: bool) -> None:
    refuse_existing(path, overwrite=overwrite)
    if path.exists() and not is_calibration(path):
        raise UsageError(
            f"{path}: not a calibration, so it is not overwritten",
            hint="choose another path, or remove it yourself",
            where=str(path),
        )


def is_calibration(path: Path) -> bool:
    """Whether svdq wrote this folder as a calibration, or nothing is in it."""
    if path.is_dir() and not any(path.iterdir()):
        return True
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def _groups(stats: Mapping[str, ActivationStats]) -> Iterator[list[ActivationStats]]:
    """The inputs in their order, in groups of at most MAX_FILE_BYTES (a single larger input gets its own file)."""
    group: list[ActivationStats] = []
    size = 0
    for item in stats.values():
        needed = sum(each.nbytes for each in _tensors(item).values())
        if group and size + needed > MAX_FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += needed
    if group:
        yield group


def _tensors(stats: ActivationStats) -> dict[str, Tensor]:
    """The tensors that an input has, by the names that they are stored under."""
    found: dict[str, Tensor] = {
        part: getattr(stats, part) for part in (*_TENSORS, "over_time") if getattr(stats, part) is not None
    }
    if stats.covariance is not None:
        found.update((f"covariance.{name}", getattr(stats.covariance, name)) for name in _COVARIANCE)
    for part, tensor in found.items():
        if tensor.dtype != _PARTS[part]:
            raise TypeError(f"{stats.name}/{part} is {tensor.dtype}, not {_PARTS[part]}")
    return {part: tensor.cpu().contiguous() for part, tensor in found.items()}


def _covariance(found: Mapping[str, Tensor], tokens: int) -> InputCovariance | None:
    """Of `_tensors`."""
    parts = {name: found[key] for name in _COVARIANCE if (key := f"covariance.{name}") in found}
    return InputCovariance(**parts, tokens=tokens) if len(parts) == len(_COVARIANCE) else None


def _entry(stats: ActivationStats, file: str) -> InputEntry:
    rows, k = stats.rows.shape
    return InputEntry(
        name=stats.name,
        k=k,
        rows=rows,
        tokens_seen=stats.tokens_seen,
        file=file,
        sha256=_stats_sha256(stats),
        peak=stats.abs_max.max().item(),
        output_peaks=dict(stats.output_peaks),
        covariance_tokens=stats.covariance.tokens if stats.covariance else 0,
    )


def _stats_sha256(stats: ActivationStats) -> str:
    digest = hashlib.sha256()
    for part, tensor in _tensors(stats).items():
        digest.update(f"{part}{list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(facts: CalibrationFacts, entries: list[InputEntry]) -> str:
    """sha256 over what a conversion depends on."""
    plain = _facts_json(facts)
    del plain["svdq_version"]
    del plain["settings"]["batch_size"]  # an option; what it changes, if anything, shows in the tensors
    for key in ("image", "mask", "video"):
        for file in plain["settings"].get(key, ()):
            del file["path"]  # its content counts
    inputs = [[entry.name, entry.k, entry.rows, entry.tokens_seen, entry.sha256] for entry in entries]
    text = json.dumps([CalibrationManifest.schema, plain, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _facts_json(facts: CalibrationFacts) -> dict[str, Any]:
    return {
        "svdq_version": facts.svdq_version,
        "model": {
            "class": facts.model_class,
            "family": facts.family,
            "source_sha256": facts.source_sha256,
        },
        "settings": settings_json(facts.settings),
        "prompts": {"count": facts.prompts_count, "sha256": facts.prompts_sha256},
    }


def _manifest_json(manifest: CalibrationManifest) -> dict[str, Any]:
    return {
        "schema": manifest.schema,
        "kind": KIND,
        "digest": manifest.digest,
        **_facts_json(manifest.facts),
        "files": dict(manifest.file_bytes),
        "inputs": [asdict(entry) for entry in manifest.inputs],
    }


# ---------------------------------------------------------------------------------------------------- read


def open_calibration(path: Path) -> Calibration:
    """Reads the manifest and checks that every file is there in full. Tensors stay on disk.

    Raises InputError for a folder that is missing, foreign, of another schema, or damaged.
    """
    manifest_path = path / MANIFEST
    try:
        plain = json.loads(manifest_path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{path}: not a calibration (it has no readable {MANIFEST})",
            hint="make one with svdq calibrate SOURCE -o CALIB",
            where=str(path),
        ) from None
    except ValueError as error:
        raise _damaged(manifest_path, f"not valid JSON ({error})") from None
    if not isinstance(plain, dict) or plain.get("kind") != KIND:
        raise InputError(
            f"{path}: not a calibration ({MANIFEST} describes something else)",
            hint="make one with svdq calibrate SOURCE -o CALIB",
            where=str(manifest_path),
        )
    if plain.get("schema") != CalibrationManifest.schema:
        raise InputError(
            f"{path}: calibration schema {plain.get('schema')}, this svdq reads schema {CalibrationManifest.schema}",
            hint="run svdq calibrate again with this version, or convert with the version that made it",
            where=str(manifest_path),
        )
    try:
        manifest = _manifest_of(plain)
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise _damaged(manifest_path, f"a key is missing or wrong ({error})") from None
    if _digest(manifest.facts, list(manifest.inputs)) != manifest.digest:
        raise _damaged(manifest_path, "it does not match its digest")
    _check_files(path, manifest)
    return Calibration(path=path, manifest=manifest)


def _manifest_of(plain: dict[str, Any]) -> CalibrationManifest:
    model, prompts = plain["model"], plain["prompts"]
    return CalibrationManifest(
        facts=CalibrationFacts(
            svdq_version=plain["svdq_version"],
            model_class=model["class"],
            family=model["family"],
            source_sha256=model["source_sha256"],
            settings=settings_of_json(plain["settings"]),
            prompts_sha256=prompts["sha256"],
            prompts_count=prompts["count"],
        ),
        inputs=tuple(InputEntry(**entry) for entry in plain["inputs"]),
        file_bytes=dict(plain["files"].items()),
        digest=plain["digest"],
    )


def _check_files(path: Path, manifest: CalibrationManifest) -> None:
    for name in {*manifest.file_bytes, *(entry.file for entry in manifest.inputs)}:
        if not re.fullmatch(r"[\w-]+\.safetensors", name) or name not in manifest.file_bytes:
            raise _damaged(path / MANIFEST, f"it names a file that does not belong to it: {name}")
    for name, expected in manifest.file_bytes.items():
        file = path / name
        if not file.is_file():
            raise _damaged(file, "missing")
        found = file.stat().st_size
        if found != expected:
            raise _damaged(file, f"{found} bytes instead of {expected}")


def _damaged(file: Path, what: str) -> InputError:
    return InputError(
        f"{file}: damaged calibration: {what}",
        hint="copy the folder again, or run svdq calibrate again",
        where=str(file),
    )
